"""The figures of each suite, from the rows of one device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.charts import bar_chart, line_chart
from benchmarks.plot_data import (
    SWITCHES,
    Point,
    along,
    dtypes,
    fixed_dimensions,
    select,
    speed_over,
)
from benchmarks.plot_style import FLOORS, STYLE, order
from benchmarks.rows import Measurement

UNFOLDED = "eager, unfolded"
ORTHOGONAL = "parametrizations.orthogonal"
Figures = Iterator[tuple[str, str, Figure | None]]


@dataclass(frozen=True)
class Plot:
    """A figure file with its title and caption. ``path`` is None if there is nothing to draw."""

    path: Path | None
    title: str
    caption: str


def bandwidth(rows: Sequence[Measurement], suffix: str) -> Figures:
    rows = select(rows, "edit_all_rows", "forward", "backward")
    for dtype in dtypes(rows) or [""]:
        of_dtype = [row for row in rows if row.dtype == dtype]
        panels = [
            (
                mode,
                "rows",
                "bandwidth (GB/s)",
                along([r for r in of_dtype if r.mode == mode], "rows", _gigabytes),
            )
            for mode in ("forward", "backward")
        ]
        title = f"Bandwidth against rows{dtype and f', {dtype}'}{suffix}"
        caption = (
            "Minimum traffic divided by the median time; bands: p20 to p80; "
            f"{fixed_dimensions(of_dtype, 'rows')}. torch.clone copies the hidden state."
        )
        yield title, caption, line_chart(title, [panels])


def _gigabytes(row: Measurement, milliseconds: float) -> float | None:
    return row.bytes / milliseconds / 1e6 if row.bytes else None


def speed_up(rows: Sequence[Measurement], suffix: str) -> Figures:
    rows = select(rows, "edit_all_rows", "forward", "backward")
    for dtype in dtypes(rows) or [""]:
        of_dtype = [row for row in rows if row.dtype == dtype and row.provider not in FLOORS]
        faster = speed_over(of_dtype, UNFOLDED)
        panels = [
            [
                (
                    mode,
                    name,
                    "times faster",
                    along([r for r in of_dtype if r.mode == mode], name, faster),
                )
                for name in ("d", "r")
            ]
            for mode in ("forward", "backward")
        ]
        title = f"Speed-up over {UNFOLDED}, against d and r{dtype and f', {dtype}'}{suffix}"
        caption = (
            "Above 1 is faster; bands: p20 to p80 of the provider's own time; otherwise "
            f"{fixed_dimensions(of_dtype)}."
        )
        yield title, caption, line_chart(title, panels, one=True)


def selected_rows(rows: Sequence[Measurement], suffix: str) -> Figures:
    rows = select(rows, "edit_selected_rows", "forward")
    panels = [
        (
            dtype,
            "sequence length T",
            "time (ms)",
            along([r for r in rows if r.dtype == dtype], "T", lambda _, time: time),
        )
        for dtype in dtypes(rows)
    ]
    title = f"Selected rows: time against sequence length{suffix}"
    caption = (
        "A flat line means that only the selected rows are read. Bands: p20 to p80; "
        f"{fixed_dimensions(rows, 'T')}."
    )
    yield title, caption, line_chart(title, [panels], log=True)


def _over_baseline(
    title: str, caption: str, y_label: str, rows: Sequence[Measurement], suite: str
) -> Figures:
    rows = select(rows, suite, "step")

    def value(row: Measurement) -> Point | None:
        if not row.median_ms or not row.ratio or row.provider == row.baseline:
            return None
        low, high = (
            (row.median_ms if t is None else t) / row.median_ms * row.ratio
            for t in (row.p20_ms, row.p80_ms)
        )
        return 0, row.ratio, low, high

    caption += "; lower is better; bars at p20 and p80 of the step's own time."
    yield title, caption, bar_chart(title, y_label, rows, value, one=True) if rows else None


def training_steps(rows: Sequence[Measurement], suffix: str) -> Figures:
    title, caption = (
        "Training step over the frozen model",
        "Step time over the frozen model's forward and backward",
    )
    yield from _over_baseline(
        title + suffix, caption, "times the frozen model's step", rows, "training_step"
    )


def trainer_steps(rows: Sequence[Measurement], suffix: str) -> Figures:
    title = "Step of the training program over the frozen model"
    caption = (
        "Step time including all work of the Trainer, over the frozen model's forward and backward"
    )
    yield from _over_baseline(
        title + suffix, caption, "times the frozen model's step", rows, "trainer_step"
    )


def packing(rows: Sequence[Measurement], suffix: str) -> Figures:
    title, caption = (
        "Packed batches over padded ones",
        "Time of a step over that of the padded batch with as many examples",
    )
    yield from _over_baseline(title + suffix, caption, "times the padded step", rows, "packing")


def peak_memory(rows: Sequence[Measurement], suffix: str) -> Figures:
    rows = select(rows, "training_step", "step")

    def value(row: Measurement) -> Point | None:
        mebibytes = row.peak_bytes / 2**20 if row.peak_bytes else None
        return (0, mebibytes, mebibytes, mebibytes) if mebibytes else None

    title = f"Peak memory of a training step{suffix}"
    caption = (
        "Peak of allocated memory above the memory held before the step, which excludes weights "
        "and optimizer state; lower is better."
    )
    yield (
        title,
        caption,
        bar_chart(title, "peak memory (MiB)", rows, value, one=False) if rows else None,
    )


def memory_of_layers(rows: Sequence[Measurement], suffix: str) -> Figures:
    """Draw peak memory against the number of layers.

    Models whose names differ only in their last number, such as llama-512x4 and llama-512x16, form
    a line. The line with the most models is drawn.
    """
    memory: dict[str, dict[str, dict[float, float]]] = {}
    for row in select(rows, "training_step", "step"):
        same, layers = re.fullmatch(r"(.*?)(\d*)", row.dimensions.get("model", "")).groups()
        if row.peak_bytes and layers and not row.dimensions.keys() & set(SWITCHES):
            key = row.shape.replace(row.dimensions["model"], same)
            memory.setdefault(key, {}).setdefault(row.provider, {})[float(layers)] = (
                row.peak_bytes / 2**20
            )
    sizes = {key: len(set().union(*providers.values())) for key, providers in memory.items()}
    widest = max(sizes, key=sizes.get, default="")
    lines = {}
    if sizes.get(widest, 0) > 1:
        providers = memory[widest]
        lines = {
            name: [(x, y, y, y) for x, y in sorted(providers[name].items())]
            for name in order(providers)
        }
    title = f"Peak memory against layers{suffix}"
    yield (
        title,
        f"Peak memory of a training step by the model's number of layers; {widest}.",
        line_chart(title, [[("", "layers", "peak memory (MiB)", lines)]]),
    )


def r_build(rows: Sequence[Measurement], suffix: str) -> Figures:
    rows = select(rows, "r_build", "forward", "both")
    faster, names = (
        speed_over(rows, ORTHOGONAL),
        {"forward": "forward", "both": "forward + backward"},
    )
    panels = [
        [
            (
                label,
                name,
                "times faster",
                along(
                    [r for r in rows if r.mode == mode and r.provider != ORTHOGONAL], name, faster
                ),
            )
            for name in ("layers", "d", "r")
        ]
        for mode, label in names.items()
    ]
    title = f"Build of R: speed-up over {ORTHOGONAL}{suffix}"
    caption = (
        f"Above 1 is faster; {ORTHOGONAL} of several layers: the time of one, multiplied; "
        f"otherwise {fixed_dimensions(rows)}."
    )
    yield title, caption, line_chart(title, panels, log=True, one=True)


DRAWERS = {
    "edit_all_rows": (bandwidth, speed_up),
    "edit_selected_rows": (selected_rows,),
    "r_build": (r_build,),
    "training_step": (training_steps, peak_memory, memory_of_layers),
    "trainer_step": (trainer_steps,),
    "packing": (packing,),
}


def draw(
    rows: Sequence[Measurement],
    folder: Path,
    suites: Iterable[str] = tuple(DRAWERS),
    kind: str = "svg",
) -> list[Plot]:
    """Draw the figures of one device's newest rows into ``folder``.

    Rows with different allocators are drawn in separate figures, because their times are not
    comparable.

    Returns:
        All figures. Those without rows have no path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[Plot] = []
    with rc_context(STYLE):
        for suite in suites:
            suite_rows = [row for row in rows if row.suite == suite]
            allocators = sorted({row.allocator for row in suite_rows}) or [""]
            for drawer in DRAWERS.get(suite, ()):
                for allocator in allocators:
                    suffix = f", {allocator}" if len(allocators) > 1 else ""
                    for title, caption, figure in drawer(
                        [row for row in suite_rows if row.allocator == allocator], suffix
                    ):
                        plots.append(Plot(_saved(figure, folder, title, kind), title, caption))
    return plots


def _saved(figure: Figure | None, folder: Path, title: str, kind: str) -> Path | None:
    if figure is None:
        return None
    path = folder / f"{'-'.join(re.findall('[a-z0-9]+', title.lower()))}.{kind}"
    figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
    return path
