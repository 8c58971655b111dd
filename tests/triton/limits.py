"""What the compiled kernels may cost: one entry a kernel and regime.

Each number is what the kernel reaches at its shapes; a change may bring it closer to the target, the
default of :class:`Limits`, not farther away. To print the entries that the kernels reach:

    python tests/triton/aot.py --code [--full] | python -m tests.triton.limits
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]
STEADY = 3  # loops with at least as many iterations in one program are steady-state loops
STATES = ("source", "grad", "saved_input")  # hidden states and gradients of them


class Limits(NamedTuple):
    """Limits of one kernel.

    Attributes:
        barriers: Most barriers in one iteration of a steady-state loop.
        width: Fewest bytes per thread of an access to a tensor whose rows have d elements.
        conversions: Most conversions of single floating-point numbers in such a loop.
        buffers: Fewest buffers in flight in a loop that copies asynchronously.
        reads: How often a row of the hidden state or its gradient is read.
    """

    barriers: int = 2
    width: int = 16
    conversions: int = 0
    buffers: int = 2
    reads: int = 1


NARROW_RANK = 16

# (kernel, regime) -> limits for ranks up to NARROW_RANK, and beyond
LIMITS: dict[tuple[str, str], tuple[Limits, Limits]] = {
    ("edit", "selected"): (Limits(reads=2), Limits(reads=2)),
    ("edit", "all"): (Limits(barriers=4, reads=2), Limits(barriers=4, reads=2)),
    ("edit_all_rows", "all"): (Limits(), Limits()),
    ("delta", "selected"): (Limits(), Limits()),
    ("delta", "all"): (Limits(), Limits()),
    # Beyond NARROW_RANK: r = 64 on sm_100, whose products with 64 rows go through tensor memory
    ("gradient", "selected"): (Limits(width=8), Limits(27, 16, 0, 0)),
    ("gradient", "all"): (Limits(), Limits(27, 16, 0, 0)),
    ("gram", "householder"): (Limits(), Limits()),
    ("build", "householder"): (Limits(4, 16, 4, 1), Limits(10, 16, 4, 0)),
    ("build_backward", "householder"): (Limits(3, 8, 12, 1), Limits(8, 8, 23, 0)),
}


def key(kernel: str) -> tuple[str, str]:
    """Return the name and the regime in a label such as ``edit[selected,folded]``."""
    name, _, label = kernel.rstrip("]").partition("[")
    return name, label.split(",")[0]


def limits(kernel: str, rank: int) -> Limits:
    """Return the limits of a kernel, given its label.

    Raises:
        KeyError: If the kernel has no entry.
    """
    if key(kernel) not in LIMITS:
        raise KeyError(f"tests/triton/limits.py has no entry for {key(kernel)}")
    return LIMITS[key(kernel)][rank > NARROW_RANK]


def steady(row: Row) -> Iterator[tuple[int, Row]]:
    """Yield the number and the counts of each steady-state loop of a kernel."""
    for number, loop in enumerate(row["loops"]):
        if loop["iterations"] >= STEADY:
            yield number, loop


def reads(row: Row) -> dict[str, float]:
    """Return how often a program reads each hidden state or gradient of one."""
    tensors = {name: row["tensors"].get(name) for name in STATES}
    return {n: t["read"] / t["read_distinct"] for n, t in tensors.items() if t and t["read"]}


def reached(rows: list[Row]) -> Limits:
    """Return the limits that kernels keep, none beyond its target."""
    loops = [loop for row in rows for _, loop in steady(row)]
    widths = [width for row in rows for t in row["tensors"].values() for width in t["widths"]]
    buffers = [loop["buffers"] for loop in loops if loop["copies"]]
    times = [-(-times // 1) for row in rows for times in reads(row).values()]
    target = Limits()
    return Limits(
        max([target.barriers, *(loop["barriers"] for loop in loops)]),
        min([target.width, *widths]),
        max([target.conversions, *(loop["conversions"] for loop in loops)]),
        min([target.buffers, *buffers]),
        max([target.reads, *map(int, times)]),
    )


def main() -> None:
    """Print the entries for the output of ``aot.py --code``."""
    rows = [row for row in map(json.loads, sys.stdin) if not row["target"].startswith("gfx")]
    for entry in dict.fromkeys(key(row["kernel"]) for row in rows):
        classes = [
            reached(
                [r for r in rows if key(r["kernel"]) == entry and (r["r"] > NARROW_RANK) == wide]
            )
            for wide in (False, True)
        ]
        narrow, wide = (f"Limits({', '.join(map(str, one))})" for one in classes)
        print(f'    ("{entry[0]}", "{entry[1]}"): ({narrow}, {wide}),')


if __name__ == "__main__":
    main()
