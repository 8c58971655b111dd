"""What the compiled kernels may cost: one entry a kernel and regime.

Each number is what the kernel reaches at its shapes; a change may lower a number, not raise it. The
targets are the defaults of :class:`Limits`.
"""

from __future__ import annotations

from typing import NamedTuple


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
    ("edit", "selected"): (Limits(10, 8, 0, 0, 2), Limits(20, 2, 1, 0, 4)),
    ("edit", "all"): (Limits(8, 16, 32, 1, 2), Limits(8, 4, 64, 1, 2)),
    ("delta", "selected"): (Limits(10, 8, 0, 0), Limits(16, 2, 0, 0, 2)),
    ("delta", "all"): (Limits(3, 16, 32, 1), Limits(3, 4, 16, 1)),
    ("gradient", "selected"): (Limits(8, 16, 48, 1), Limits(22, 2, 48, 0, 2)),
    ("gradient", "all"): (Limits(8, 16, 64, 1), Limits(23, 2, 64, 0, 2)),
    ("build", "householder"): (Limits(4, 16, 4, 0), Limits(4, 16, 4, 0)),
    ("build_backward", "householder"): (Limits(4, 4, 8, 0, 2), Limits(4, 4, 8, 0, 2)),
}


def limits(kernel: str, rank: int) -> Limits:
    """Return the limits of a kernel, given its label such as ``edit[selected,folded]``.

    Raises:
        KeyError: If the kernel has no entry.
    """
    name, _, label = kernel.rstrip("]").partition("[")
    regime = label.split(",")[0]
    if (name, regime) not in LIMITS:
        raise KeyError(f"tests/triton/limits.py has no entry for {name}, {regime}")
    return LIMITS[name, regime][rank > NARROW_RANK]
