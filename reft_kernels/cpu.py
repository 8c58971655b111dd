"""The ``cpu`` backend: the operators on CPU tensors by the native library built from ``csrc/cpu``.

The library implements the operators of :mod:`reft_kernels.ops` themselves, checks included:
PyTorch's dispatcher calls it without any Python between. This file loads it and says whether it can
serve. ``avx512bf16`` multiplies bf16 hidden states with weights rounded to bf16 from rank 8 on,
except under relu, and rounds its outputs with subnormal numbers as zero.
``REFT_KERNELS_CPU_ISA=avx512bf16|avx512|avx2|portable`` forces an instruction set,
``REFT_KERNELS_CPU_LIBRARY`` names another build of the library (one with sanitizers).
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
    """None when the library is loaded, else the reason; asked once."""
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
        refusal = torch.ops.reft_kernels_cpu.isa_refusal(wanted)
        if refusal:
            return f"{ISA_VARIABLE}: got {wanted!r}, {refusal}"
    return None


def instruction_set() -> str | None:
    """``avx512bf16``, ``avx512``, ``avx2`` or ``portable``, whichever the library uses here;
    None when it is off.
    """
    return torch.ops.reft_kernels_cpu.isa() if _why_off() is None else None


def unsupported_reason(operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when this backend can serve ``operator`` for tensors of that device type and dtype,
    else the reason.
    """
    if device_type != "cpu":
        return f"the native cpu backend does not serve {device_type} tensors"
    if dtype not in _DTYPES:
        return f"the native cpu backend does not serve {dtype}"
    return _why_off()


def load() -> bool:
    """Load the library, once, with which its kernels are the operators on CPU tensors; False
    when it is off.
    """
    if _why_off() is not None:
        return False
    host_memory.start()
    return True


def serve(wanted: bool) -> None:
    """Whether the library's kernels are to run on CPU tensors, or the backend that
    :mod:`reft_kernels.dispatch` selects.
    """
    torch.ops.reft_kernels_cpu.serve(wanted)
