"""Compare two files of raw rows, such as the same suites before and after a change.

    python -m benchmarks.compare A.csv B.csv [--all]

The newest rows of both files are matched by suite, dtype, shape, mode, provider and allocator.
Each line shows the ratio B / A of the medians with the interval [B.p20 / A.p80, B.p80 / A.p20]
and a verdict. "faster" and "slower" require that the intervals p20..p80 of A and B do not overlap
and that the medians differ by more than 3 %. All other pairs are "within noise" and are printed
only with ``--all``. The column ``ratio`` is not compared, because it refers to a baseline
measured in the same run. Rows that only one file has, or has a time for, are listed.

The exit status is 0 for any comparison and 2 when a file cannot be read.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Measurement

OURS = "reft_kernels"
# lower bounds: these providers do only part of the work
FLOORS = frozenset({"torch.clone", "no edit", "the rows alone", "frozen model", "torch"})
SMALLEST_CHANGE = 0.03
UNREADABLE = (OSError, ValueError, csv.Error)


def devices(folder: Path) -> dict[str, list[Measurement]]:
    """Read every CSV file in the subfolders of ``folder``.

    Returns:
        The newest rows of each device, by device name.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If :func:`benchmarks.rows.read` rejects a file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    measurements: dict[str, list[Measurement]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        for row in rows.read(path):
            measurements.setdefault(row.device, []).append(row)
    return {device: rows.latest(measurements[device]) for device in sorted(measurements)}


def on_gpu(measurements: Iterable[Measurement]) -> bool:
    """Return whether the rows of one device were measured on a GPU."""
    return any(row.allocator == "cuda" for row in measurements)


def cases(measurements: Iterable[Measurement]) -> Iterator[list[Measurement]]:
    """Yield the rows of each case, in order of first appearance.

    A case is everything in :attr:`Measurement.key` except the provider.
    """
    ranks: dict[tuple[str, ...], int] = {}
    ordered = sorted(measurements, key=lambda row: ranks.setdefault(row.key[:-1], len(ranks)))
    for _, case in groupby(ordered, key=lambda row: row.key[:-1]):
        yield list(case)


def is_ours(row: Measurement) -> bool:
    """Return whether the row's provider is reft_kernels, with any backend or map."""
    return row.provider.startswith(OURS)


def chosen(case: Iterable[Measurement]) -> list[Measurement]:
    """Return the rows of reft_kernels' default backend, or of each map to orthonormal rows."""
    ours = [row for row in case if is_ours(row)]
    return [row for row in ours if row.provider == OURS] or ours


def interval(row: Measurement) -> tuple[float, float]:
    """Return the 20th and 80th percentile, or the median where either is missing."""
    low, high = (row.median_ms if value is None else value for value in (row.p20_ms, row.p80_ms))
    return low, high


def verdict(a: Measurement, b: Measurement) -> str:
    """Return whether ``b`` is "faster", "slower" or "within noise" compared with ``a``."""
    (a_low, a_high), (b_low, b_high) = interval(a), interval(b)
    apart = b_high < a_low or a_high < b_low
    if not apart or abs(b.median_ms / a.median_ms - 1) <= SMALLEST_CHANGE:
        return "within noise"
    return "faster" if b.median_ms < a.median_ms else "slower"


@dataclass(frozen=True)
class Behind:
    """A case in which other providers are faster than reft_kernels.

    Attributes:
        own: The row of reft_kernels.
        others: Correct providers that are faster by more than noise, or all of them where ``own``
            has no time. Fastest first.
    """

    own: Measurement
    others: tuple[Measurement, ...]

    @property
    def factor(self) -> float:
        """The time of ``own`` divided by the fastest time, or infinity if ``own`` has no time."""
        return (
            float("inf")
            if self.own.median_ms is None
            else self.own.median_ms / self.others[0].median_ms
        )


def behind(measurements: Iterable[Measurement]) -> list[Behind]:
    """Return the cases in which another provider is faster, worst first.

    Backends of reft_kernels other than its default count as other providers.
    """
    losses = []
    for case in cases(measurements):
        ours = chosen(case)
        others = [r for r in case if r not in ours and r.median_ms and r.provider not in FLOORS]
        others.sort(key=lambda r: r.median_ms)
        for own in ours:
            faster = tuple(
                r for r in others if own.median_ms is None or verdict(own, r) == "faster"
            )
            if faster:
                losses.append(Behind(own, faster))
    return sorted(losses, key=lambda loss: -loss.factor)


def _key(row: Measurement) -> tuple[str, ...]:
    return (row.suite, row.dtype, row.shape, row.mode, row.provider, row.allocator)


def _name(key: tuple[str, ...]) -> str:
    suite, dtype, shape, mode, provider, allocator = key
    return f"{suite}, {mode}: {shape}, {dtype}, {allocator}: {provider}"


def _newest(path: Path) -> dict[tuple[str, ...], Measurement]:
    return {
        _key(row): row for row in sorted(rows.latest(rows.read(path)), key=lambda row: row.when)
    }


def _warn(a: Iterable[Measurement], b: Iterable[Measurement]) -> None:
    for name in ("device", "threads"):
        of_a, of_b = (sorted({str(getattr(row, name)) for row in side}) for side in (a, b))
        if of_a != of_b:
            print(
                f"warning: different {name}: A {', '.join(of_a) or 'none'}; B "
                f"{', '.join(of_b) or 'none'}",
                file=sys.stderr,
            )


def report(
    a: dict[tuple[str, ...], Measurement],
    b: dict[tuple[str, ...], Measurement],
    everything: bool = False,
) -> Iterator[str]:
    """Yield the lines of a comparison of two files of rows."""
    counts = dict.fromkeys(("faster", "slower", "within noise", "without a time"), 0)
    for key in [key for key in a if key in b]:
        old, new = a[key], b[key]
        if not old.median_ms or not new.median_ms:
            counts["without a time"] += 1
            if old.median_ms or new.median_ms or everything:
                times = (
                    f"{side} {row.note or f'{row.median_ms:.4g} ms'}"
                    for side, row in (("A", old), ("B", new))
                )
                yield f"{'no time':<12}  {_name(key)}: {'; '.join(times)}"
            continue
        result = verdict(old, new)
        counts[result] += 1
        if result != "within noise" or everything:
            (old_low, old_high), (new_low, new_high) = interval(old), interval(new)
            ratio = (
                f"x {new.median_ms / old.median_ms:.3g} [{new_low / old_high:.3g}, "
                f"{new_high / old_low:.3g}]"
            )
            times = f"{old.median_ms:.4g} -> {new.median_ms:.4g} ms"
            yield f"{result:<12}  {ratio:<24}  {_name(key)}: {times}"
    for side, this, other in (("A", a, b), ("B", b, a)):
        yield from (f"{f'only in {side}':<12}  {_name(key)}" for key in this if key not in other)
    totals = [f"{count} {name}" for name, count in counts.items()]
    unmatched = [
        f"{len(this.keys() - other.keys())} only in {side}"
        for side, this, other in (("A", a, b), ("B", b, a))
    ]
    yield f"{sum(counts.values())} matched: {', '.join(totals)}; {', '.join(unmatched)}"


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description="Compare two files of raw rows."
    )
    parser.add_argument("a", type=Path, metavar="A.csv")
    parser.add_argument("b", type=Path, metavar="B.csv")
    parser.add_argument("--all", action="store_true", help="print the rows within noise too")
    args = parser.parse_args(argv)
    try:
        a, b = _newest(args.a), _newest(args.b)
    except UNREADABLE as reason:
        print(f"compare: {reason}", file=sys.stderr)
        return 2
    _warn(a.values(), b.values())
    for line in report(a, b, args.all):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
