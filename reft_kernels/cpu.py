"""The ``cpu`` backend: loads the native library built from ``csrc/cpu``.

The library implements the operators of :mod:`reft_kernels.ops` for CPU tensors, including the
argument checks. PyTorch's dispatcher calls it directly, without Python code in between.

With the instruction set ``avx512bf16`` and bf16 hidden states, weights are rounded to bf16 for
ranks of 8 or more, except with relu, and subnormal outputs are flushed to zero.

Environment variables:

    REFT_KERNELS_CPU_ISA      Forces ``avx512bf16``, ``avx512``, ``avx2`` or ``portable``.
    REFT_KERNELS_CPU_LIBRARY  Path of another build of the library, such as one with sanitizers.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from reft_kernels import host_memory

LIBRARY_VARIABLE = "REFT_KERNELS_CPU_LIBRARY"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name("_native_cpu.so"))
ISA_VARIABLE = "REFT_KERNELS_CPU_ISA"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@functools.cache
def _why_off() -> str | None:
    """Load the library on the first call; return None, or the reason why it cannot be used."""
    if not LIBRARY.exists():
        if os.environ.get(LIBRARY_VARIABLE):
            return f"{LIBRARY_VARIABLE}: got {str(LIBRARY)!r}, expected an existing file"
        return (
            "the native library was not built: install with a C++17 compiler and ninja, "
            "without REFT_KERNELS_BUILD_NATIVE=0 (README, Install)"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return (
            f"the native library {LIBRARY.name} does not load into torch {torch.__version__}: "
            f"{error}"
        )
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        reason = torch.ops.reft_kernels_cpu.isa_unsupported_reason(wanted)
        if reason:
            return f"{ISA_VARIABLE}: got {wanted!r}, {reason}"
    return None


def instruction_set() -> str | None:
    """Return the instruction set that the library uses on this machine.

    Returns:
        ``"avx512bf16"``, ``"avx512"``, ``"avx2"`` or ``"portable"``, or None if the library cannot
        be used.
    """
    return torch.ops.reft_kernels_cpu.isa() if _why_off() is None else None


def unsupported_reason(operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot run an operator, or None if it can.

    Args:
        operator: An operator; the library implements all of them.
        device_type: Device type of the tensors.
        dtype: Dtype of the tensors.
    """
    if device_type != "cpu":
        return f"the native cpu backend does not support {device_type} tensors"
    if dtype not in _DTYPES:
        return f"the native cpu backend does not support {dtype}"
    return _why_off()


def load() -> bool:
    """Load the library, which registers its kernels as the operators for CPU tensors.

    Returns:
        Whether the library can be used.
    """
    if _why_off() is not None:
        return False
    host_memory.start()
    return True


def set_enabled(wanted: bool) -> None:
    """Enable or disable the library's kernels for CPU tensors.

    Args:
        wanted: True to use the library's kernels, False to forward calls to the backend that
            :mod:`reft_kernels.dispatch` selects.
    """
    torch.ops.reft_kernels_cpu.set_enabled(wanted)
