"""What the compiled kernels may cost: one entry a kernel and regime.

Each number is what the kernel reaches at its shapes; a change may bring it closer to the target, the
default of :class:`tests.compiled_code.Limits`, not farther away. To print the entries that the kernels reach:

    python tests/triton/aot.py --code [--full] | python -m tests.triton.limits
"""

from __future__ import annotations

from tests.compiled_code import Limits, print_entries

NARROW_RANK = 16

# (kernel, regime) -> limits for ranks up to NARROW_RANK, and beyond
LIMITS: dict[tuple[str, str], tuple[Limits, Limits]] = {
    ("edit", "selected"): (Limits(reads=2), Limits(reads=2)),
    # Programs that read a part of the columns, for the forward pass and for delta
    ("project", "selected"): (Limits(), Limits()),
    ("write", "selected"): (Limits(), Limits()),
    ("factors", "selected"): (Limits(), Limits()),
    ("edit", "all"): (Limits(barriers=4, reads=2), Limits(barriers=4, reads=2)),
    ("edit_all_rows", "all"): (Limits(), Limits()),
    ("delta", "selected"): (Limits(), Limits()),
    ("delta", "all"): (Limits(), Limits()),
    ("gradient", "selected"): (Limits(width=8), Limits()),
    ("gradient", "all"): (Limits(), Limits()),
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


if __name__ == "__main__":
    print_entries(key, NARROW_RANK)
