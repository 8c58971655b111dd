"""The short table at the end of a pass: how each part ended, and its main figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Measurement

MOST_ROWS = 60  # the end of the output may be all that comes back


def _figure(row: Measurement) -> str:
    if row.median_ms is None:
        return row.note[:70]
    ms = row.graph_ms if row.graph_ms is not None else row.median_ms
    figures = [f"{ms * 1e3:10.2f} us" + ("" if row.graph_ms is not None else " (with host)")]
    if row.clone_fraction is not None:
        figures.append(f"{row.clone_fraction:.0%} of clone")
    if row.ratio is not None:
        figures.append(f"x {row.ratio:.3g} of {row.baseline}")
    return "  ".join(figures)


def figures(folder: Path) -> Iterator[str]:
    """Yield a line per row of the CSV files of a part."""
    for file in sorted(folder.glob("*.csv")):
        if file.name.startswith("ncu"):
            continue
        try:
            found = rows.latest(rows.read(file))
        except (ValueError, OSError) as error:
            yield f"  {file.name}: {error}"
            continue
        for row in found:
            case = f"{row.mode} {row.shape} {row.dtype}"
            yield f"  {case:<62} {row.provider[:34]:<34} {_figure(row)}"


def lines(ends: dict[str, dict[str, str]], folder: Path) -> Iterator[str]:
    """Yield the table: main figures first, then a line per part."""
    shown = [line for part in ends for line in figures(folder / part)]
    yield from shown[:MOST_ROWS]
    if len(shown) > MOST_ROWS:
        yield f"  and {len(shown) - MOST_ROWS} more rows in the archives"
    for part, steps in ends.items():
        yield f"{part:<10} " + "; ".join(f"{step}: {end}" for step, end in steps.items())
