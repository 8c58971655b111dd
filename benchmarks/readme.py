"""Write the table of figures in the README from the newest raw rows of every device.

    python -m benchmarks.readme [--check]

What stands between the markers ``<!-- figures -->`` and ``<!-- /figures -->`` is replaced.
``--check`` writes nothing and tells
by its exit status whether the README is up to date: 0 yes, 1 no. 2: no markers, or rows that cannot
be read.

A suite is shown by few cases, chosen by their shape alone: :data:`PICKED` says which.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from reft_train.files import write_text

from benchmarks import compare, plots, suites
from benchmarks.compare import Behind
from benchmarks.page import NO_GPU, without_gpu
from benchmarks.rows import RESULTS, Row

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
MOST_LOSSES = 12
MODES = {
    "both": ", forward + backward",
    "inside": ", forward + backward between two operations of a graph",
    "step": "",
    "call": "",
}
Case = list[Row]


def _number(row: Row, name: str) -> int:
    return int(row.dimensions.get(name, 1))


def _largest(
    cases: Sequence[Case], same: Callable[[Row], object], size: Callable[[Row], int]
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
    centre = plots.base([case[0] for case in cases])
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
    centre = plots.base([case[0] for case in cases])
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
    at = [case for case in cases if not case[0].dimensions.keys() & set(plots.SWITCHES)]
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
}


def _times(value: float) -> str:
    return (
        f"1/{1 / value:,.0f}"
        if 0 < value < 0.01
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def _time(row: Row) -> str:
    """The median with its unit, or why there is none."""
    if row.median_ms is None:
        return row.note.split(":")[0] or "no time"
    if row.median_ms < 0.1:
        return f"{1e3 * row.median_ms:.3g} us"
    return f"{row.median_ms:,.0f} ms" if row.median_ms >= 100 else f"{row.median_ms:.3g} ms"


def _figure(row: Row) -> str:
    """The ratio, with the share of torch.clone's bandwidth for reft_kernels; the time where it has
    none; or the note.
    """
    if row.median_ms is None or row.ratio is None:
        return _time(row)
    clone = (
        row.clone_fraction if compare.is_ours(row) and row.baseline not in compare.FLOORS else None
    )
    return _times(row.ratio) + (f" ({clone:.0%} of clone)" if clone is not None else "")


def _joined(figures: Sequence[str]) -> str:
    return figures[0] if len(set(figures)) == 1 else " / ".join(figures)


def _title(row: Row) -> str:
    return suites.load(row.suite).TITLE + MODES.get(row.mode, f", {row.mode}")


def _line(group: Sequence[Case]) -> str:
    """A table row for cases that differ in their dtype alone."""
    first = group[0][0]
    by_name = [{row.provider: row for row in case} for case in group]
    names = list(dict.fromkeys(name for found in by_name for name in found))
    standing = {row.provider for case in group for row in compare.chosen(case)}
    others = [
        name
        for name in names
        if name not in standing
        and name != first.baseline
        and name != "torch.clone"
        and not (compare.OURS in standing and name.startswith(compare.OURS))
    ]

    def told(name: str, short: bool) -> str:
        figures = _joined([_figure(found[name]) if name in found else "-" for found in by_name])
        said = name.removeprefix(compare.OURS).strip(" ,") if short else name
        return f"{said} {figures}".strip()

    own = "; ".join(f"**{told(name, True)}**" for name in names if name in standing)
    base = [found.get(first.baseline) for found in by_name]
    times = _joined(["-" if row is None else _time(row) for row in base])
    shape = first.shape + (
        f" {first.allocator}" if first.allocator not in ("cuda", "malloc") else ""
    )
    dtypes = " / ".join(case[0].dtype for case in group)
    cells = (
        _title(first),
        f"{shape}, {dtypes}",
        first.device,
        f"{first.baseline}: {times}",
        own,
        "; ".join(told(name, False) for name in others),
    )
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _lines(devices: dict[str, list[Row]]) -> list[str]:
    lines = []
    for suite, pick in PICKED.items():
        for found in devices.values():
            own = list(compare.cases(row for row in found if row.suite == suite))
            groups: dict[tuple[str, ...], list[Case]] = {}
            for case in pick(own) if own else []:
                row = case[0]
                groups.setdefault((row.mode, row.shape, row.allocator, row.baseline), []).append(
                    case
                )
            lines += [_line(group) for group in groups.values()]
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


def _losses(devices: dict[str, list[Row]]) -> list[str]:
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


def figures(devices: dict[str, list[Row]]) -> str:
    """What belongs between the markers.

    Raises:
        ValueError: rows of a suite that does not exist.
    """
    lines = _lines(devices)
    text = [
        "Time over the baseline's in the same rounds: below 1 is faster. Values with slashes "
        "follow the dtypes.",
        "",
    ]
    if lines:
        text += [
            "| suite | case | device | baseline | reft_kernels | others |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    text += _losses(devices)
    missing = [f"- {suites.load(name).TITLE}: {NO_GPU}" for name in without_gpu(devices)]
    return "\n".join([*text, *([""] if missing else []), *missing])


def filled(readme: str, content: str) -> str:
    """``readme`` with ``content`` between the markers.

    Raises:
        ValueError: not exactly one pair of markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"markers: expected one {BEGIN} and after it one {END}")
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def main(argv: list[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme", description="Write the README's table of figures."
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, exit with 1 when the README is out of date",
    )
    args = parser.parse_args(argv)
    try:
        old = readme.read_bytes().decode()
        new = filled(old, figures(compare.devices(results)))
        if new != old and not args.check:
            write_text(readme, new)
    except compare.UNREADABLE as reason:
        print(f"readme: {reason}", file=sys.stderr)
        return 2
    if args.check and new != old:
        print(
            f"readme: {readme.name} does not show the newest rows; run python -m benchmarks.readme",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
