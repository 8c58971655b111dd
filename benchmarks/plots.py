"""The figures of one device's rows. A provider has the same colour and marker in all of them."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks import compare
from benchmarks.rows import Row

UNFOLDED = "eager, unfolded"
ORTHOGONAL = "parametrizations.orthogonal"
SWITCHES = ("checkpointing", "compiled")  # in the shape of a training step where on
# a family shares a hue, so that a name that is not listed still looks like its kin
COLOURS = {
    "reft_kernels": ("#0b5fa5", "#4f9bd9", "#08306b", "#7fb8e6"),
    "eager": ("#e07b00", "#b34700", "#f2b04d", "#8a5a00"),
    "torch.compile": ("#2a8f3c", "#7bbf5a", "#14591f"),
    "pyreft": ("#8e44ad", "#b98ad0"),
    "adapters": ("#c0392b",),
    "householder_product": ("#16a2a2",),
}
FLOORS = dict.fromkeys(compare.FLOORS, "#555555") | {"frozen model": "#9a9a9a"}
LISTED = {
    "reft_kernels": 0,
    "reft_kernels householder": 0,
    "reft_kernels cayley": 1,
    "reft_kernels, torch backend": 1,
    "reft_kernels, triton backend": 2,
    "reft_kernels, cuda backend": 3,
    "eager, unfolded": 0,
    "eager, folded": 1,
    "eager, clone and scatter": 0,
    "eager, in place": 1,
    "eager hooks": 0,
    "eager hooks, cached R": 1,
    "reft_kernels, in adapters": 1,
    "reft_kernels, in pyreft": 3,
    "torch.compile, folded": 0,
    "torch.compile, in place": 0,
}
OTHERS = ("#c2358f", "#8c6d31", "#5b5bd6", "#6b8e23")
MARKERS = {
    "reft_kernels": "o",
    "eager": "s",
    "torch.compile": "^",
    "pyreft": "D",
    "adapters": "P",
    "householder_product": "X",
}
MOST_GROUPS = 5  # of bars side by side
LOG_FROM = 30  # largest over smallest value from which an axis is logarithmic
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "reft_kernels",
    "figure.facecolor": "white",
    "savefig.dpi": 110,
}


@dataclass(frozen=True)
class Plot:
    """A figure; ``path`` is None where its rows are missing."""

    path: Path | None
    title: str
    caption: str


Point = tuple[float, float, float, float]  # x, y, and the y of p20 and of p80
Lines = dict[str, list[Point]]


def family(provider: str) -> str:
    """The part of a provider's name that its colours go by; the whole name when it is of no
    family.
    """
    return next((name for name in COLOURS if provider.startswith(name)), provider)


def colour(provider: str) -> str:
    """A provider's colour, whatever the figure."""
    if provider in FLOORS:
        return FLOORS[provider]
    number = LISTED.get(provider, zlib.crc32(provider.encode()))
    shades = COLOURS.get(family(provider), OTHERS)
    return shades[number % len(shades)]


def order(providers: Iterable[str]) -> list[str]:
    """Distinct providers: floors, reft_kernels, then the rest by family and name."""
    families = list(COLOURS)

    def place(name: str) -> tuple[bool, int, int, str]:
        own = family(name)
        return (
            name not in FLOORS,
            families.index(own) if own in families else len(families),
            LISTED.get(name, 99),
            name,
        )

    return sorted(set(providers), key=place)


def base(rows: Iterable[Row]) -> dict[str, str]:
    """For each name in the shapes its most frequent value, which is the centre when one is
    varied at a time.
    """
    counts: dict[str, Counter[str]] = {}
    for shape in {row.shape: row.dimensions for row in rows}.values():
        for name, value in shape.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def along(rows: Sequence[Row], name: str, y: Callable[[Row, float], float | None]) -> Lines:
    """A line for each provider: ``y(row, milliseconds)`` of median, p20 and p80 against
    ``name``, the rest at its base.
    """
    centre = base(rows)
    centre.pop(name, None)
    found: Lines = {}
    for row in rows:
        shape = row.dimensions
        if not row.median_ms or name not in shape or {**shape, **centre} != shape:
            continue
        values = [
            y(row, row.median_ms if t is None else t)
            for t in (row.median_ms, row.p20_ms, row.p80_ms)
        ]
        if None not in values:
            found.setdefault(row.provider, []).append((float(shape[name]), *values))
    return {name: sorted(found[name]) for name in order(found)}


def _fixed(rows: Sequence[Row], *varied: str) -> str:
    centre = base(rows)
    return ", ".join(f"{name} = {value}" for name, value in centre.items() if name not in varied)


def _plain(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _draw_lines(axes: Axes, lines: Lines) -> None:
    for provider, points in lines.items():
        x, y, low, high = zip(*points, strict=True)
        floor = provider in FLOORS
        look = {
            "marker": MARKERS.get(family(provider), "v"),
            "zorder": 3 if family(provider) == "reft_kernels" else 2,
        }
        if floor:
            look = {"marker": "." if len(x) == 1 else "", "zorder": 4, "linestyle": "--"}
        axes.plot(x, y, color=colour(provider), label=provider, **look)
        axes.fill_between(x, low, high, color=colour(provider), alpha=0.13, linewidth=0)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in lines.values() for point in points})
    axes.set_xticks(ticks)
    if len(ticks) > 5:
        axes.tick_params(axis="x", labelsize=8.5, labelrotation=35)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))


def _scale(axes: Axes, values: Sequence[float], log: bool) -> None:
    if not log:
        axes.set_ylim(0, 1.08 * max(values))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(
        NullFormatter() if max(values) > 10 * min(values) else FuncFormatter(_plain)
    )


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = order(handles)
    lines = -(-len(names) // min(4, int(figure.get_figwidth() // 2.3)))
    columns = -(-len(names) // lines)
    figure.legend(
        [handles[name] for name in names], names, loc="outside lower center", ncols=columns
    )


def _grid(
    title: str,
    panels: list[list[tuple[str, str, str, Lines]]],
    log: bool = False,
    one: bool = False,
) -> Figure | None:
    """Panels (title, x label, y label, lines) on one y axis, by row and column; ``one`` marks 1.
    None when all are empty.
    """
    every = [
        point
        for line in panels
        for *_, lines in line
        for points in lines.values()
        for point in points
    ]
    if not every:
        return None
    figure = Figure(figsize=(4.6 * len(panels[0]), 3.1 * len(panels) + 1), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = figure.subplots(len(panels), len(panels[0]), squeeze=False, sharey=True)
    values = [value for _, *ys in every for value in ys] + [1] * one
    for line, places in zip(panels, grid, strict=True):
        for k, ((head, x, y, lines), axes) in enumerate(zip(line, places, strict=True)):
            axes.set(title=head, xlabel=x, ylabel="" if k else y)
            if lines:
                _draw_lines(axes, lines)
            else:
                axes.text(
                    0.5,
                    0.5,
                    "not measured",
                    ha="center",
                    va="center",
                    transform=axes.transAxes,
                    color="#777777",
                )
                axes.set(xticks=[])
            if one:
                axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":", zorder=1)
    _scale(grid[0, 0], values, log or max(values) > LOG_FROM * min(values))
    _legend(figure, grid.flat)
    return figure


def _of(rows: Iterable[Row], suite: str, *modes: str) -> list[Row]:
    return [row for row in rows if row.suite == suite and row.mode in modes]


def _dtypes(rows: Iterable[Row]) -> list[str]:
    return sorted({row.dtype for row in rows}, key=lambda name: (name != "float32", name))


Drawn = Iterator[tuple[str, str, Figure | None]]


def _bandwidth(rows: Sequence[Row], suffix: str) -> Drawn:
    rows = _of(rows, "edit_all_rows", "forward", "backward")
    for dtype in _dtypes(rows) or [""]:
        own = [row for row in rows if row.dtype == dtype]
        panels = [
            (
                mode,
                "rows",
                "bandwidth (GB/s)",
                along([r for r in own if r.mode == mode], "rows", _gigabytes),
            )
            for mode in ("forward", "backward")
        ]
        title = f"Bandwidth against rows{dtype and f', {dtype}'}{suffix}"
        caption = (
            f"Least traffic over the median time; bands p20 to p80; {_fixed(own, 'rows')}. "
            "torch.clone copies the hidden state."
        )
        yield title, caption, _grid(title, [panels])


def _gigabytes(row: Row, milliseconds: float) -> float | None:
    return row.bytes / milliseconds / 1e6 if row.bytes else None


def _over(rows: Sequence[Row], baseline: str) -> Callable[[Row, float], float | None]:
    """How many times faster than the baseline in the same case; from the paired ratio where the
    row has that baseline.
    """
    times = {
        row.key[:-1]: row.median_ms for row in rows if row.provider == baseline and row.median_ms
    }

    def faster(row: Row, milliseconds: float) -> float | None:
        if row.baseline == baseline and row.ratio:
            return row.median_ms / milliseconds / row.ratio
        time = times.get(row.key[:-1])
        layers = row.dimensions.get("layers")
        if time is None and layers:
            one = row.shape.replace(f"layers={layers}", "layers=1")
            single = times.get((*row.key[:4], one, row.mode))
            time = single and single * int(layers)
        return time / milliseconds if time else None

    return faster


def _speed_up(rows: Sequence[Row], suffix: str) -> Drawn:
    rows = _of(rows, "edit_all_rows", "forward", "backward")
    for dtype in _dtypes(rows) or [""]:
        own = [row for row in rows if row.dtype == dtype and row.provider not in FLOORS]
        faster = _over(own, UNFOLDED)
        panels = [
            [
                (
                    mode,
                    name,
                    "times faster",
                    along([r for r in own if r.mode == mode], name, faster),
                )
                for name in ("d", "r")
            ]
            for mode in ("forward", "backward")
        ]
        title = f"Speed-up over {UNFOLDED}, against d and r{dtype and f', {dtype}'}{suffix}"
        caption = (
            "Above 1 is faster; bands: p20 to p80 of the provider's own time; otherwise "
            f"{_fixed(own)}."
        )
        yield title, caption, _grid(title, panels, one=True)


def _selected(rows: Sequence[Row], suffix: str) -> Drawn:
    rows = _of(rows, "edit_selected_rows", "forward")
    panels = [
        (
            dtype,
            "sequence length T",
            "time (ms)",
            along([r for r in rows if r.dtype == dtype], "T", lambda _, time: time),
        )
        for dtype in _dtypes(rows)
    ]
    title = f"Selected rows: time against sequence length{suffix}"
    caption = (
        f"Flat is good: only the selected rows are read. Bands p20 to p80; {_fixed(rows, 'T')}."
    )
    yield title, caption, _grid(title, [panels], log=True)


def _size(row: Row) -> tuple[float, ...]:
    """Sorts models by width squared times layers, then by tokens."""
    shape = row.dimensions
    numbers = [int(n) for n in re.findall(r"\d+", shape.get("model", ""))]
    weights = numbers[-2] ** 2 * numbers[-1] if len(numbers) > 1 else sum(numbers)
    return weights, int(shape.get("batch", 1)) * int(shape.get("T", 1))


def _labels(rows: Sequence[Row]) -> dict[tuple[str, str], str]:
    """By shape and dtype: the model, and what is not the same in all cases."""
    shapes = [row.dimensions for row in rows]
    varied = {
        name for shape in shapes for name in shape if len({other.get(name) for other in shapes}) > 1
    }
    dtypes = len(_dtypes(rows)) > 1
    labels = {}
    for row in sorted(rows, key=_size):
        shape = row.dimensions
        parts = [shape.get("model", "")]
        if varied & {"batch", "T"}:
            parts.append(f"{shape.get('batch')} x {shape.get('T')}")
        parts += [
            f"{k} = {v}"
            for k, v in shape.items()
            if k in varied and k in ("positions", "r", "layers", "d", "lengths")
        ]
        parts += [name for name in SWITCHES if shape.get(name) not in (None, "0")]
        labels[row.shape, row.dtype] = "\n".join(parts + [row.dtype] * dtypes)
    return labels


def _bars(
    title: str, y_label: str, rows: Sequence[Row], value: Callable[[Row], Point | None], one: bool
) -> Figure | None:
    """A group of bars for each shape, a bar for each provider; what could not be measured is
    said in its place.
    """
    providers, labels = order(row.provider for row in rows), _labels(rows)
    drawn = {(row.shape, row.dtype, row.provider): value(row) for row in rows}
    if not any(drawn.values()):
        return None
    providers = [name for name in providers if any(drawn.get((*place, name)) for place in labels)]
    places = list(labels)
    lines = [places[k : k + MOST_GROUPS] for k in range(0, len(places), MOST_GROUPS)]
    groups = len(lines[0])
    figure = Figure(
        figsize=(max(6.5, 1.6 + 0.36 * groups * (len(providers) + 1)), 3.6 * len(lines) + 1),
        layout="constrained",
    )
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(lines), 1, squeeze=False, sharey=True)[:, 0]
    notes = {(row.shape, row.dtype, row.provider): row.note.split(":")[0] for row in rows}
    for axes, line in zip(panels, lines, strict=True):
        _draw_bars(axes, line, providers, drawn, notes)
        axes.set_xticks(range(len(line)), [labels[place] for place in line], fontsize=8.5)
        axes.set(ylabel=y_label, xlim=(-0.55, groups - 0.45))
        axes.grid(axis="x", visible=False)
        axes.set_axisbelow(True)
        if one:
            axes.axhline(1, color="#555555", linewidth=0.9, linestyle=":")
    values = [point[1] for point in drawn.values() if point] + [1] * one
    tops = [max(point[1:]) for point in drawn.values() if point] + [1] * one
    _scale(panels[0], tops, max(values) > LOG_FROM * min(values))
    _legend(figure, panels)
    return figure


Place = tuple[str, str]  # shape and dtype


def _draw_bars(
    axes: Axes,
    places: Sequence[Place],
    providers: Sequence[str],
    drawn: dict[tuple[str, str, str], Point | None],
    notes: dict[tuple[str, str, str], str],
) -> None:
    width = 0.84 / len(providers)
    for k, provider in enumerate(providers):
        for n, place in enumerate(places):
            x, point = n - 0.42 + (k + 0.5) * width, drawn.get((*place, provider))
            if point is None:
                said = notes.get((*place, provider), "").replace(
                    "absent", ""
                )  # a package that is elsewhere: the table says so
                axes.text(
                    x,
                    0.015,
                    said,
                    rotation=90,
                    ha="center",
                    va="bottom",
                    fontsize=8,
                    color=colour(provider),
                    transform=axes.get_xaxis_transform(),
                )
                continue
            _, y, low, high = point
            errors = [[max(y - low, 0)], [max(high - y, 0)]] if high > low else None
            axes.bar(
                x,
                y,
                0.92 * width,
                color=colour(provider),
                label=provider,
                yerr=errors,
                ecolor="#333333",
            )
            axes.annotate(
                _plain(y),
                (x, max(y, high)),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )


def _over_baseline(
    title: str, caption: str, y_label: str, rows: Sequence[Row], suite: str
) -> Drawn:
    rows = _of(rows, suite, "step")

    def value(row: Row) -> Point | None:
        if not row.median_ms or not row.ratio or row.provider == row.baseline:
            return None
        low, high = (
            (row.median_ms if t is None else t) / row.median_ms * row.ratio
            for t in (row.p20_ms, row.p80_ms)
        )
        return 0, row.ratio, low, high

    caption += "; lower is better; bars at p20 and p80 of the step's own time."
    yield title, caption, _bars(title, y_label, rows, value, one=True) if rows else None


def _steps(rows: Sequence[Row], suffix: str) -> Drawn:
    title, caption = (
        "Training step over the frozen model",
        "Step time over the frozen model's forward and backward",
    )
    yield from _over_baseline(
        title + suffix, caption, "times the frozen model's step", rows, "training_step"
    )


def _program(rows: Sequence[Row], suffix: str) -> Drawn:
    title = "Step of the training program over the frozen model"
    caption = (
        "Step time, all that the Trainer does included, over the frozen model's forward and "
        "backward"
    )
    yield from _over_baseline(
        title + suffix, caption, "times the frozen model's step", rows, "trainer_step"
    )


def _packing(rows: Sequence[Row], suffix: str) -> Drawn:
    title, caption = (
        "Packed batches over padded ones",
        "Time of a step on as many examples, over the randomly padded batch's",
    )
    yield from _over_baseline(title + suffix, caption, "times the padded step", rows, "packing")


def _memory(rows: Sequence[Row], suffix: str) -> Drawn:
    rows = _of(rows, "training_step", "step")

    def value(row: Row) -> Point | None:
        mebibytes = row.peak_bytes / 2**20 if row.peak_bytes else None
        return (0, mebibytes, mebibytes, mebibytes) if mebibytes else None

    title = f"Peak memory of a training step{suffix}"
    caption = (
        "Most memory allocated above what stood before the step, weights and optimizer state left "
        "out; lower is better."
    )
    yield (
        title,
        caption,
        _bars(title, "peak memory (MiB)", rows, value, one=False) if rows else None,
    )


def _memory_of_layers(rows: Sequence[Row], suffix: str) -> Drawn:
    """Of models whose names differ in their last number alone, such as llama-512x4 and
    llama-512x16, those with most sizes.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for row in _of(rows, "training_step", "step"):
        same, layers = re.fullmatch(r"(.*?)(\d*)", row.dimensions.get("model", "")).groups()
        if row.peak_bytes and layers and not row.dimensions.keys() & set(SWITCHES):
            key = row.shape.replace(row.dimensions["model"], same)
            found.setdefault(key, {}).setdefault(row.provider, {})[float(layers)] = (
                row.peak_bytes / 2**20
            )
    sizes = {key: len(set().union(*providers.values())) for key, providers in found.items()}
    widest = max(sizes, key=sizes.get, default="")
    lines = {}
    if sizes.get(widest, 0) > 1:
        providers = found[widest]
        lines = {
            name: [(x, y, y, y) for x, y in sorted(providers[name].items())]
            for name in order(providers)
        }
    title = f"Peak memory against layers{suffix}"
    yield (
        title,
        f"As above, by the model's number of layers; {widest}.",
        _grid(title, [[("", "layers", "peak memory (MiB)", lines)]]),
    )


def _r_build(rows: Sequence[Row], suffix: str) -> Drawn:
    rows = _of(rows, "r_build", "forward", "both")
    faster, names = _over(rows, ORTHOGONAL), {"forward": "forward", "both": "forward + backward"}
    panels = [
        [
            (
                said,
                name,
                "times faster",
                along(
                    [r for r in rows if r.mode == mode and r.provider != ORTHOGONAL], name, faster
                ),
            )
            for name in ("layers", "d", "r")
        ]
        for mode, said in names.items()
    ]
    title = f"Build of R: speed-up over {ORTHOGONAL}{suffix}"
    caption = (
        f"Above 1 is faster; several layers cost {ORTHOGONAL} one layer's time as often; "
        f"otherwise {_fixed(rows)}."
    )
    yield title, caption, _grid(title, panels, log=True, one=True)


DRAWERS = {
    "edit_all_rows": (_bandwidth, _speed_up),
    "edit_selected_rows": (_selected,),
    "r_build": (_r_build,),
    "training_step": (_steps, _memory, _memory_of_layers),
    "trainer_step": (_program,),
    "packing": (_packing,),
}


def draw(
    rows: Sequence[Row], folder: Path, suites: Iterable[str] = tuple(DRAWERS), kind: str = "svg"
) -> list[Plot]:
    """Draw the figures of one device's newest rows into ``folder``; a figure without rows is
    returned without a path.

    Where memory was had in several ways, each has its own figures, since their times do not
    compare.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots: list[Plot] = []
    with rc_context(STYLE):
        for suite in suites:
            own = [row for row in rows if row.suite == suite]
            allocators = sorted({row.allocator for row in own}) or [""]
            for drawer in DRAWERS.get(suite, ()):
                for allocator in allocators:
                    suffix = f", {allocator}" if len(allocators) > 1 else ""
                    for title, caption, figure in drawer(
                        [row for row in own if row.allocator == allocator], suffix
                    ):
                        plots.append(Plot(_saved(figure, folder, title, kind), title, caption))
    return plots


def _saved(figure: Figure | None, folder: Path, title: str, kind: str) -> Path | None:
    if figure is None:
        return None
    path = folder / f"{'-'.join(re.findall('[a-z0-9]+', title.lower()))}.{kind}"
    figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
    return path
