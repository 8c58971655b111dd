"""Write the tables of figures in docs/measured.md from the newest raw rows of every device.

    python -m benchmarks.readme [--check]

What stands between the markers ``<!-- figures -->`` and ``<!-- /figures -->`` is replaced.
``--check`` writes nothing and tells by its exit status whether the page is up to date: 0 yes, 1 no.
2: no markers, or rows that cannot be read.

A suite is shown by few cases, chosen by their shape alone: :data:`PICKED` says which.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from reft_train.files import write_text

from benchmarks import compare, plot_data, suites
from benchmarks.compare import Behind
from benchmarks.page import NO_GPU, without_gpu
from benchmarks.rows import RESULTS, Measurement

PAGE = Path(__file__).resolve().parents[1] / "docs" / "measured.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
MOST_LOSSES = 12
MODES = {
    "both": ", forward + backward",
    "inside": ", forward + backward between two operations of a graph",
    "step": "",
    "call": "",
}
Case = list[Measurement]


def _number(row: Measurement, name: str) -> int:
    return int(row.dimensions.get(name, 1))


def _largest(
    cases: Sequence[Case], same: Callable[[Measurement], object], size: Callable[[Measurement], int]
) -> list[Case]:
    """Of the cases that agree in ``same`` those of the largest ``size``."""
    largest: dict[object, int] = {}
    for case in cases:
        group = same(case[0])
        largest[group] = max(largest.get(group, 0), size(case[0]))
    return [case for case in cases if size(case[0]) == largest[same(case[0])]]


def _edits(cases: Sequence[Case]) -> list[Case]:
    """Forward, forward + backward, and both inside a graph, at d = 4096, r = 8 and 32, as many rows
    as the base shape has.
    """
    centre = plot_data.base([case[0] for case in cases])
    at = [
        c
        for c in cases
        if c[0].dimensions.get("rows") == centre["rows"] and c[0].dimensions.get("d") == "4096"
    ]
    return [
        case
        for case in at
        if case[0].mode in ("forward", "both", "inside")
        and case[0].dimensions.get("r") in ("8", "32")
    ]


def _selected(cases: Sequence[Case]) -> list[Case]:
    """T = 512 and 8192, or the longest below, otherwise the base shape."""
    centre = plot_data.base([case[0] for case in cases])
    centre.pop("T", None)
    at = [case for case in cases if {**case[0].dimensions, **centre} == case[0].dimensions]
    lengths = {_number(case[0], "T") for case in at}
    wanted = {512, max((length for length in lengths if length <= 8192), default=0)}
    return [case for case in at if _number(case[0], "T") in wanted]


def _builds(cases: Sequence[Case]) -> list[Case]:
    """Forward and gradient of one layer and of 32, d = 4096, r = 8."""
    at = [case for case in cases if case[0].mode == "both"]
    wanted = {"d": "4096", "r": "8"}
    return [
        c
        for c in at
        if {**c[0].dimensions, **wanted} == c[0].dimensions and _number(c[0], "layers") in (1, 32)
    ]


def _models(cases: Sequence[Case]) -> list[Case]:
    """Each model with the most tokens measured, without checkpointing or torch.compile."""
    at = [case for case in cases if not case[0].dimensions.keys() & set(plot_data.SWITCHES)]
    return _largest(
        at,
        lambda row: (row.mode, row.dimensions.get("model"), row.dtype, row.allocator),
        lambda row: _number(row, "batch") * _number(row, "T"),
    )


PICKED: dict[str, Callable[[Sequence[Case]], list[Case]]] = {
    "edit_all_rows": _edits,
    "edit_selected_rows": _selected,
    "r_build": _builds,
    "training_step": _models,
    "generation": _models,
    "trainer_step": _models,
    "packing": list,
    "peft_methods": list,
    "many_adapters": list,
}


def _times(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    # three digits that count, never in the notation with an exponent
    return (
        f"{value:.3g}"
        if value >= 1e-4 or value <= 0
        else f"{value:.{2 - math.floor(math.log10(value))}f}"
    )


def _time(row: Measurement) -> str:
    """The median with its unit, or why there is none."""
    if row.median_ms is None:
        return row.note.split(":")[0] or "no time"
    if row.median_ms < 0.1:
        return f"{1e3 * row.median_ms:.3g} us"
    return f"{row.median_ms:,.0f} ms" if row.median_ms >= 100 else f"{row.median_ms:.3g} ms"


def _figure(row: Measurement) -> str:
    """The ratio, with the share of torch.clone's bandwidth for reft_kernels; the time where it has
    none; or the note.
    """
    if row.median_ms is None or row.ratio is None:
        return _time(row)
    clone = (
        row.clone_fraction if compare.is_ours(row) and row.baseline not in compare.FLOORS else None
    )
    return _times(row.ratio) + (f" ({clone:.0%} of clone)" if clone is not None else "")


def _title(row: Measurement) -> str:
    return suites.load(row.suite).TITLE + MODES.get(row.mode, f", {row.mode}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _table(group: Sequence[Case]) -> list[str]:
    """A heading and a table for cases of one suite, device, mode and baseline: a row for each case
    and dtype.
    """
    first = group[0][0]
    names = list(dict.fromkeys(row.provider for case in group for row in case))
    standing = {row.provider for case in group for row in compare.chosen(case)}
    own = [name for name in names if name in standing]
    others = [
        name
        for name in names
        if name not in standing
        and name != first.baseline
        and name != "torch.clone"
        and not (compare.OURS in standing and name.startswith(compare.OURS))
    ]
    shown = [first.baseline, *(name for name in own if name != first.baseline), *others]
    lines = [
        f"### {_title(first)}",
        "",
        f"Device {first.device}; time over that of: {first.baseline}.",
        "",
        _row(["case", "dtype", *shown]),
        f"|{'---|' * (2 + len(shown))}",
    ]
    for case in group:
        found = {row.provider: row for row in case}
        row = case[0]
        shape = row.shape + (f" {row.allocator}" if row.allocator not in ("cuda", "malloc") else "")
        cells = [shape, row.dtype]
        for name in shown:
            if name not in found:
                cells.append("-")
            elif name == first.baseline:
                cells.append(_time(found[name]))
            else:
                cells.append(
                    f"**{_figure(found[name])}**" if name in standing else _figure(found[name])
                )
        lines.append(_row(cells))
    return [*lines, ""]


def _lines(devices: dict[str, list[Measurement]]) -> list[str]:
    lines = []
    for suite, pick in PICKED.items():
        for found in devices.values():
            own = list(compare.cases(row for row in found if row.suite == suite))
            groups: dict[tuple[str, ...], list[Case]] = {}
            for case in pick(own) if own else []:
                groups.setdefault((case[0].mode, case[0].baseline), []).append(case)
            for group in groups.values():
                lines += _table(group)
    return lines


def _loss(loss: Behind) -> str:
    own = loss.own
    memory = f", {own.allocator}" if own.allocator not in ("cuda", "malloc") else ""
    case = f"{_title(own)}, {own.shape}, {own.dtype}, {own.device}{memory}"
    if own.median_ms is None:
        return (
            f"- {case}: {own.provider} has no time ({own.note}), {loss.others[0].provider} has one"
        )
    faster = "; ".join(
        f"{row.provider} {_times(own.median_ms / row.median_ms)} times faster"
        for row in loss.others
    )
    said = "" if own.provider == compare.OURS else f" than {own.provider}"
    return f"- {case}: {faster}{said}"


def _losses(devices: dict[str, list[Measurement]]) -> list[str]:
    losses = sorted(
        (loss for rows in devices.values() for loss in compare.behind(rows)),
        key=lambda loss: -loss.factor,
    )
    total = sum(
        len(compare.chosen(case)) for rows in devices.values() for case in compare.cases(rows)
    )
    if not losses:
        return [f"Where reft_kernels is slower than another provider: in none of {total} cases."]
    told = f"{len(losses)} of {total} cases"
    if len(losses) > MOST_LOSSES:
        told += f", the {MOST_LOSSES} worst here, all on the page of `python -m benchmarks.page`"
    return [
        f"Where reft_kernels is slower than another provider by more than noise ({told}):",
        "",
        *(_loss(loss) for loss in losses[:MOST_LOSSES]),
    ]


def figures(devices: dict[str, list[Measurement]]) -> str:
    """What belongs between the markers.

    Raises:
        ValueError: rows of a suite that does not exist.
    """
    text = [*_lines(devices), "### Where others are faster", "", *_losses(devices)]
    missing = [f"- {suites.load(name).TITLE}: {NO_GPU}" for name in without_gpu(devices)]
    return "\n".join([*text, *(["", "### Not measured", ""] if missing else []), *missing])


def filled(page: str, content: str) -> str:
    """``page`` with ``content`` between the markers.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"markers: expected one {BEGIN} and after it one {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(argv: list[str] | None = None, page: Path = PAGE, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme",
        description="Write the tables of figures in docs/measured.md.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, exit with 1 when the page is out of date",
    )
    args = parser.parse_args(argv)
    try:
        old = page.read_bytes().decode()
        new = filled(old, figures(compare.devices(results)))
        if new != old and not args.check:
            write_text(page, new)
    except compare.UNREADABLE as reason:
        print(f"readme: {reason}", file=sys.stderr)
        return 2
    if args.check and new != old:
        print(
            f"readme: {page.name} does not show the newest rows; run python -m benchmarks.readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
