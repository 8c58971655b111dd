"""The ``cpu`` backend: the operators on CPU tensors by the native library built from ``csrc/cpu``.

Each function has the contract of the function of its name in :mod:`reft_kernels.reference`. This
side allocates outputs and makes weights contiguous; the library computes. ``avx512bf16`` multiplies
bf16 hidden states with weights rounded to bf16 from rank 8 on, except under relu, and rounds its
outputs with subnormal numbers as zero. ``REFT_KERNELS_CPU_ISA=avx512bf16|avx512|avx2|portable``
forces an instruction set, ``REFT_KERNELS_CPU_LIBRARY`` names another build of the library (one with
sanitizers).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.activations import ACTIVATIONS
from reft_kernels.allocation import contiguous
from reft_kernels.dtypes import accumulation_dtype

LIBRARY_VARIABLE = "REFT_KERNELS_CPU_LIBRARY"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name("_native_cpu.so"))
ISA_VARIABLE = "REFT_KERNELS_CPU_ISA"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATION_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS)}


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


def _wanted(*tensors: Tensor) -> list[Tensor | None]:
    """Outputs as the library takes them: an empty one is not wanted."""
    return [tensor if tensor.numel() else None for tensor in tensors]


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """``[M, d]`` with consecutive channels; a copy only where they are not."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] <= 1 else tensor.contiguous()


def _written(out: Tensor | None, target: Tensor | None) -> None:
    """Bring back what was written to a copy of ``out``."""
    if out is not None and target is not out:
        out.copy_(target)


def _targets(source: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``source`` and ``out`` with consecutive channels, one tensor where they were one."""
    dense = _rows(source)
    return dense, dense if out is source else (None if out is None else _rows(out))


def edit(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    subtract_bias: Tensor | None,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    saved_input, u, z = allocation.edit_saved(source, rows, write, activation, save)
    dense, target = _targets(source, out)
    torch.ops.reft_kernels_cpu.edit.default(
        dense,
        target,
        contiguous(rows),
        contiguous(weight_ids),
        contiguous(read),
        contiguous(read_bias),
        contiguous(write),
        contiguous(subtract_bias),
        contiguous(coeff),
        subtract_projection,
        _ACTIVATION_NUMBER[activation],
        *_wanted(saved_input, u, z),
    )
    _written(out, target)
    return saved_input, u, z


def edit_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    u: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = allocation.edit_gradients(
        grad, rows, read, write, coeff, subtract_projection, need_weights
    )
    dense, target = _targets(grad, out)
    torch.ops.reft_kernels_cpu.edit_backward.default(
        dense,
        target,
        _rows(saved_input) if need_weights else saved_input,
        contiguous(u),
        None if activation == "linear" else contiguous(z),
        contiguous(rows),
        contiguous(weight_ids),
        contiguous(read),
        contiguous(write),
        contiguous(coeff),
        subtract_projection,
        _ACTIVATION_NUMBER[activation],
        *_wanted(*grads),
    )
    _written(out, target)
    return grads


def red(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    save: bool,
) -> Tensor:
    saved_input = allocation.red_saved_input(source, rows, save)
    dense, target = _targets(source, out)
    torch.ops.reft_kernels_cpu.red.default(
        dense,
        target,
        contiguous(rows),
        contiguous(weight_ids),
        contiguous(scale),
        contiguous(bias),
        *_wanted(saved_input),
    )
    _written(out, target)
    return saved_input


def red_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    grads = allocation.red_gradients(grad, scale, need_weights)
    dense, target = _targets(grad, out)
    torch.ops.reft_kernels_cpu.red_backward.default(
        dense,
        target,
        _rows(saved_input) if need_weights else saved_input,
        contiguous(rows),
        contiguous(weight_ids),
        contiguous(scale),
        *_wanted(*grads),
    )
    _written(out, target)
    return grads


def _build(
    operator,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    point: Tensor | None,
    W: Tensor | None,
):
    acc = accumulation_dtype(X.dtype)
    R, D, aux = allocation.build(X, base, W)
    operator(
        _as(X, acc),
        _as(signs, acc),
        _as(base, acc),
        _as(point, acc),
        _as(W, acc),
        R,
        D if W is not None else None,
        aux,
    )
    return R, D, aux


def _build_backward(
    operator, grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    acc = accumulation_dtype(X.dtype)
    if grad_R is None and grad_D is None:
        return allocation.no_build_gradient(X)
    grad_X = X.new_empty(X.shape, dtype=acc)
    operator(
        _as(grad_R, acc),
        _as(grad_D, acc),
        _as(X, acc),
        _as(signs, acc),
        _as(base, acc),
        _as(aux, acc),
        grad_X,
    )
    return grad_X.to(X.dtype)


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    return _build(torch.ops.reft_kernels_cpu.householder.default, X, signs, base, point, W)


def householder_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    return _build_backward(
        torch.ops.reft_kernels_cpu.householder_backward.default, grad_R, grad_D, X, signs, base, aux
    )


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    return _build(torch.ops.reft_kernels_cpu.cayley.default, X, signs, base, point, W)


def cayley_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    return _build_backward(
        torch.ops.reft_kernels_cpu.cayley_backward.default, grad_R, grad_D, X, signs, base, aux
    )
