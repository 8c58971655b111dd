"""What the compiled kernels of csrc/cuda may cost: one entry a kernel and regime.

As tests/triton/limits.py. Where a number is not the target, a comment gives the reason. To print the
entries that the kernels reach:

    python tests/cuda/code.py [--full] | python -m tests.cuda.limits
"""

from __future__ import annotations

from tests.compiled_code import Limits, print_entries
from tests.triton.limits import NARROW_RANK, key

# (kernel, regime) -> limits for ranks up to NARROW_RANK, and beyond
LIMITS: dict[tuple[str, str], tuple[Limits, Limits]] = {
    ("edit_tiles", "selected"): (Limits(), Limits()),
    ("edit_tiles", "all"): (Limits(), Limits()),
    ("edit_delta_tiles", "selected"): (Limits(), Limits()),
    # Rows are read once for each weight vector, or for two beyond rank 16, and once more for y: the
    # first time from L2, then from L1. Half-precision rows of one set take edit_tiles instead.
    ("edit_forward", "selected"): (Limits(reads=17), Limits(reads=33)),
    ("edit_delta", "selected"): (Limits(reads=16), Limits(reads=32)),
    # A block reads 32 columns of A and B, a value a thread, and all rows once for each eight ranks.
    # The ring of buffers is filled in the loop over ranks, whose copies are counted as its own, so
    # the number in advance is not known here.
    ("edit_gradient", "selected"): (Limits(2, 4, 4, 0, 2), Limits(2, 4, 4, 0, 8)),
    # Adjacent threads access adjacent columns of R, D and W, 128 bytes a warp; sums are in fp64.
    ("build_forward", "householder"): (Limits(2, 4, 16), Limits(2, 4, 16)),
    ("build_backward", "householder"): (Limits(2, 4, 16), Limits(2, 4, 16)),
}


def limits(kernel: str, rank: int) -> Limits:
    """Return the limits of a kernel, given its label.

    Raises:
        KeyError: If the kernel has no entry.
    """
    if key(kernel) not in LIMITS:
        raise KeyError(f"tests/cuda/limits.py has no entry for {key(kernel)}")
    return LIMITS[key(kernel)][rank > NARROW_RANK]


if __name__ == "__main__":
    print_entries(key, NARROW_RANK)
