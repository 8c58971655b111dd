"""Compare two files of raw rows, such as the same suites before and after a change, and providers
with one another.

    python -m benchmarks.compare A.csv B.csv [--all]

The newest rows of both files are matched by suite, dtype, shape, mode, provider and allocator.
Printed is the ratio B / A of the medians with the interval [B.p20 / A.p80, B.p80 / A.p20] and a
verdict. "faster" or "slower" needs both that the intervals p20..p80 of A and B do not overlap and
that the medians differ by more than 3 %; anything else is "within noise" and is printed only with
``--all``. Only medians are compared: the column ``ratio`` refers to a baseline that was itself
measured in the same run, so it can stay while both times moved; read it on the page. Rows that only
one file has, or has a time for, are listed.

Exit status: 0 for any comparison, 2 when a file cannot be read.
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
from benchmarks.rows import Row

OURS = "reft_kernels"
FLOORS = frozenset(
    {"torch.clone", "no edit", "the rows alone", "frozen model", "torch"}
)  # they do less than was asked
SMALLEST_CHANGE = 0.03
UNREADABLE = (OSError, ValueError, csv.Error)


def devices(folder: Path) -> dict[str, list[Row]]:
    """The newest rows of every CSV in the folders of ``folder``, by device.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that :func:`benchmarks.rows.read` does not accept.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, list[Row]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        for row in rows.read(path):
            found.setdefault(row.device, []).append(row)
    return {device: rows.latest(found[device]) for device in sorted(found)}


def on_gpu(found: Iterable[Row]) -> bool:
    """Whether rows of one device were measured on a GPU."""
    return any(row.allocator == "cuda" for row in found)


def cases(found: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows of each case, that is of everything in :attr:`Row.key` but the provider, in order of
    first appearance.
    """
    ranks: dict[tuple[str, ...], int] = {}
    ordered = sorted(found, key=lambda row: ranks.setdefault(row.key[:-1], len(ranks)))
    for _, case in groupby(ordered, key=lambda row: row.key[:-1]):
        yield list(case)


def is_ours(row: Row) -> bool:
    """Whether reft_kernels did the work, with whatever backend or map."""
    return row.provider.startswith(OURS)


def chosen(case: Iterable[Row]) -> list[Row]:
    """The rows that stand for reft_kernels: its own choice of a backend, or each of its maps."""
    own = [row for row in case if is_ours(row)]
    return [row for row in own if row.provider == OURS] or own


def interval(row: Row) -> tuple[float, float]:
    """p20 and p80 in ms, each the median where it is missing."""
    low, high = (row.median_ms if value is None else value for value in (row.p20_ms, row.p80_ms))
    return low, high


def verdict(a: Row, b: Row) -> str:
    """What the medians say of ``b`` against ``a``: "faster", "slower" or "within noise"."""
    (a_low, a_high), (b_low, b_high) = interval(a), interval(b)
    apart = b_high < a_low or a_high < b_low
    if not apart or abs(b.median_ms / a.median_ms - 1) <= SMALLEST_CHANGE:
        return "within noise"
    return "faster" if b.median_ms < a.median_ms else "slower"


@dataclass(frozen=True)
class Behind:
    """A case in which others are faster than reft_kernels.

    Attributes:
        own: reft_kernels' row.
        others: the correct providers that are faster by more than noise, or all where ``own`` has
            no time; fastest first.
    """

    own: Row
    others: tuple[Row, ...]

    @property
    def factor(self) -> float:
        """The time of ``own`` over the fastest's; infinite where it has none."""
        return (
            float("inf")
            if self.own.median_ms is None
            else self.own.median_ms / self.others[0].median_ms
        )


def behind(found: Iterable[Row]) -> list[Behind]:
    """Every case in which another provider, or a backend that reft_kernels did not choose, is
    faster; the worst first.
    """
    losses = []
    for case in cases(found):
        standing = chosen(case)
        rivals = [r for r in case if r not in standing and r.median_ms and r.provider not in FLOORS]
        rivals.sort(key=lambda r: r.median_ms)
        for own in standing:
            faster = tuple(
                r for r in rivals if own.median_ms is None or verdict(own, r) == "faster"
            )
            if faster:
                losses.append(Behind(own, faster))
    return sorted(losses, key=lambda loss: -loss.factor)


def _key(row: Row) -> tuple[str, ...]:
    return (row.suite, row.dtype, row.shape, row.mode, row.provider, row.allocator)


def _name(key: tuple[str, ...]) -> str:
    suite, dtype, shape, mode, provider, allocator = key
    return f"{suite}, {mode}: {shape}, {dtype}, {allocator}: {provider}"


def _newest(path: Path) -> dict[tuple[str, ...], Row]:
    return {
        _key(row): row for row in sorted(rows.latest(rows.read(path)), key=lambda row: row.when)
    }


def _warn(a: Iterable[Row], b: Iterable[Row]) -> None:
    for name in ("device", "threads"):
        own, other = (sorted({str(getattr(row, name)) for row in side}) for side in (a, b))
        if own != other:
            print(
                f"warning: different {name}: A {', '.join(own) or 'none'}; B "
                f"{', '.join(other) or 'none'}",
                file=sys.stderr,
            )


def report(
    a: dict[tuple[str, ...], Row], b: dict[tuple[str, ...], Row], everything: bool = False
) -> Iterator[str]:
    """The lines of a comparison of rows by what they are matched by."""
    counts = dict.fromkeys(("faster", "slower", "within noise", "without a time"), 0)
    for key in [key for key in a if key in b]:
        old, new = a[key], b[key]
        if not old.median_ms or not new.median_ms:
            counts["without a time"] += 1
            if old.median_ms or new.median_ms or everything:
                told = (
                    f"{side} {row.note or f'{row.median_ms:.4g} ms'}"
                    for side, row in (("A", old), ("B", new))
                )
                yield f"{'no time':<12}  {_name(key)}: {'; '.join(told)}"
            continue
        found = verdict(old, new)
        counts[found] += 1
        if found != "within noise" or everything:
            (old_low, old_high), (new_low, new_high) = interval(old), interval(new)
            ratio = (
                f"x {new.median_ms / old.median_ms:.3g} [{new_low / old_high:.3g}, "
                f"{new_high / old_low:.3g}]"
            )
            times = f"{old.median_ms:.4g} -> {new.median_ms:.4g} ms"
            yield f"{found:<12}  {ratio:<24}  {_name(key)}: {times}"
    for side, own, other in (("A", a, b), ("B", b, a)):
        yield from (f"{f'only in {side}':<12}  {_name(key)}" for key in own if key not in other)
    told = [f"{count} {name}" for name, count in counts.items()]
    alone = [
        f"{len(own.keys() - other.keys())} only in {side}"
        for side, own, other in (("A", a, b), ("B", b, a))
    ]
    yield f"{sum(counts.values())} matched: {', '.join(told)}; {', '.join(alone)}"


def main(argv: list[str] | None = None) -> int:
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
