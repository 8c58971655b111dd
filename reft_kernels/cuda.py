"""The CUDA C++ backend (``csrc/cuda``): the edit of selected rows, and the orthonormal maps for all
layers in one launch.

The kernels are built at install time with ``REFT_KERNELS_BUILD_CUDA=1`` into ``_native_cuda.so``
beside this file, and reach PyTorch through its stable ABI. Every function has the contract of
:mod:`reft_kernels.reference`; launches: one for ``edit``, at most two for ``edit_backward``, one
for each map and each map's backward. Sums have a fixed order: two runs are bit-identical.
``REFT_KERNELS_CUDA_LIBRARY`` names another build of the library. One that runs the kernels in the
emulation of the tests (``tests/cuda/emulation``) serves CPU tensors, and no others: it is to these
kernels what ``TRITON_INTERPRET=1`` is to Triton's.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.activations import ACTIVATIONS
from reft_kernels.allocation import contiguous

LIBRARY_VARIABLE = "REFT_KERNELS_CUDA_LIBRARY"
LIBRARY = Path(os.environ.get(LIBRARY_VARIABLE) or Path(__file__).with_name("_native_cuda.so"))
MAX_RANK = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GPUS = "the CUDA kernels serve tensors on NVIDIA GPUs"
_RANK_MULTIPLE = 8  # the backward's [N, r] scratch is padded to it


@functools.cache
def _why_not_loaded() -> str | None:
    """Load the library once; None when its operators exist, else the reason."""
    if not LIBRARY.exists():
        if os.environ.get(LIBRARY_VARIABLE):
            return f"{LIBRARY_VARIABLE}: got {str(LIBRARY)!r}, expected an existing file"
        return (
            "the CUDA kernels were not built: install with REFT_KERNELS_BUILD_CUDA=1 and the CUDA "
            "toolkit's nvcc"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load: {error.__cause__ or error}"
    return None


def emulated() -> bool:
    """Whether the library runs the kernels in the emulation; an installed library, which never
    does, is not loaded for it.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    return (
        bool(named)
        and _why_not_loaded() is None
        and hasattr(torch.ops.reft_kernels_cuda, "emulated")
    )


def unsupported_reason(operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None when the CUDA kernels can serve ``operator`` for tensors of that device type and dtype,
    else the reason.

    Edits over all rows, hidden states whose channels are strided, and RED go from here to Triton.
    """
    if dtype not in _DTYPES:
        return (
            "the CUDA kernels accumulate in fp32 and serve fp32, bf16 and fp16, not "
            f"{str(dtype).removeprefix('torch.')}"
        )
    if torch.version.hip is not None or (
        device_type != "cuda" and not os.environ.get(LIBRARY_VARIABLE)
    ):
        return _GPUS
    reason = _why_not_loaded()
    if reason is not None:
        return reason
    if emulated():
        return None if device_type == "cpu" else "the emulated CUDA kernels serve CPU tensors"
    if device_type != "cuda":
        return _GPUS
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return (
            f"the CUDA kernels need compute capability 8.0 or later, this GPU has {major}.{minor}"
        )
    return None


def _elsewhere(operator: str) -> Callable:
    """What serves a call that these kernels leave out: Triton; the reference where it is not
    installed, or in the emulation.
    """
    name = "reference" if emulated() or importlib.util.find_spec("triton") is None else "triton"
    return getattr(importlib.import_module(f"reft_kernels.{name}"), operator)


def _dense_channels(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dim() < 2 or t.shape[1] <= 1 or t.stride(1) == 1 for t in tensors)


def _small(tensor: Tensor | None) -> Tensor | None:
    """Contiguous and of a served dtype; nothing is copied where it already is."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in _DTYPES else tensor.float()).contiguous()


def _weights(hidden: Tensor, read: Tensor | None, write: Tensor) -> tuple[Tensor | None, Tensor]:
    """Convert weights for the row kernels: all fp32, or all of the hidden state's dtype.

    Any other combination is converted to fp32.
    """
    kinds = {w.dtype for w in (read, write) if w is not None}
    if kinds not in ({torch.float32}, {hidden.dtype}):
        read, write = None if read is None else read.float(), write.float()
    return contiguous(read), write.contiguous()


def _check_rank(write: Tensor) -> None:
    if not 1 <= write.shape[-2] <= MAX_RANK:
        raise ValueError(
            f"write: got rank {write.shape[-2]}, the CUDA kernels serve ranks from 1 to {MAX_RANK}"
        )


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
    """The contract of :func:`reft_kernels.reference.edit`, in one launch; over all rows it is
    Triton's.
    """
    if rows is None or not _dense_channels(source, out):
        return _elsewhere("edit")(
            source,
            out,
            rows,
            weight_ids,
            read,
            read_bias,
            write,
            subtract_bias,
            coeff,
            subtract_projection,
            activation,
            save,
        )
    _check_rank(write)
    saved_input, u, z = allocation.edit_saved(source, rows, write, activation, save)
    if rows.shape[0] > 0:
        read, write = _weights(source, read, write)
        torch.ops.reft_kernels_cuda.edit_forward.default(
            source,
            out,
            rows.contiguous(),
            contiguous(weight_ids),
            read,
            _small(read_bias),
            write,
            _small(subtract_bias),
            _small(coeff),
            subtract_projection,
            ACTIVATIONS.index(activation),
            saved_input,
            u,
            z,
        )
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
    """The contract of :func:`reft_kernels.reference.edit_backward`, in two launches (one where only
    dcoeff is wanted).

    Over all rows it is Triton's.
    """
    if rows is None or not _dense_channels(grad, out, saved_input):
        return _elsewhere("edit_backward")(
            grad,
            out,
            saved_input,
            u,
            z,
            rows,
            weight_ids,
            read,
            write,
            coeff,
            subtract_projection,
            activation,
            need_weights,
        )
    _check_rank(write)
    num_rows, rank = rows.shape[0], write.shape[-2]

    grads = allocation.edit_gradients(
        grad, rows, read, write, coeff, subtract_projection, need_weights
    )
    grad_read, grad_bias, grad_write, grad_subtract_bias, grad_coeff = grads
    if num_rows == 0:
        for empty_sum in grads:
            empty_sum.zero_()
        return grads
    rows, weight_ids = rows.contiguous(), contiguous(weight_ids)
    read, write = _weights(grad, read, write)
    chosen = ACTIVATIONS.index(activation)
    count = 3 if subtract_projection and activation != "linear" else 2
    padded = -(-rank // _RANK_MULTIPLE) * _RANK_MULTIPLE
    small = grad.new_empty((num_rows, count, padded), dtype=torch.float32)
    native = torch.ops.reft_kernels_cuda
    native.edit_delta.default(
        grad,
        rows,
        weight_ids,
        write,
        _small(coeff),
        u.contiguous(),
        z.contiguous(),
        chosen,
        small,
        grad_coeff,
    )
    if out is not None or need_weights:
        native.edit_gradient.default(
            grad,
            out,
            saved_input,
            rows,
            weight_ids,
            read,
            write,
            small,
            subtract_projection,
            chosen,
            grad_read,
            grad_bias,
            grad_write,
            grad_subtract_bias,
        )
    return grads


def red(source: Tensor, *args) -> Tensor:
    """The contract of :func:`reft_kernels.reference.red`; it is Triton's."""
    return _elsewhere("red")(source, *args)


def red_backward(grad: Tensor, *args) -> tuple[Tensor, Tensor]:
    """The contract of :func:`reft_kernels.reference.red_backward`; it is Triton's."""
    return _elsewhere("red_backward")(grad, *args)


def _single(*tensors: Tensor | None) -> list[Tensor | None]:
    """fp32 and contiguous; nothing is copied where it already is."""
    return [None if t is None else t.float().contiguous() for t in tensors]


def _build(is_cayley: bool, X: Tensor, signs, base, point, W):
    layers, d, r = X.shape
    if not 1 <= r <= min(d, MAX_RANK):
        raise ValueError(
            f"X: got d = {d}, r = {r}, the CUDA kernels serve 1 <= r <= min(d, {MAX_RANK})"
        )
    R, D, aux = allocation.build(X, base, W)
    if layers > 0:
        torch.ops.reft_kernels_cuda.build_forward.default(
            *_single(X, signs, base, point, W), is_cayley, R, D, aux
        )
    return R, D, aux


def _build_backward(is_cayley: bool, grad_R, grad_D, X: Tensor, signs, base, aux: Tensor) -> Tensor:
    if (grad_R is None and grad_D is None) or X.shape[0] == 0:
        return allocation.no_build_gradient(X)
    grad_X = X.new_empty(X.shape, dtype=torch.float32)
    torch.ops.reft_kernels_cuda.build_backward.default(
        *_single(grad_R, grad_D, X, signs, base, aux), is_cayley, grad_X
    )
    return grad_X.to(X.dtype)


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and T (with a base also
    V0^T V) as ``aux``; fp32.
    """
    return _build(False, X, signs, base, point, W)


def householder_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]`` in X's dtype, zero on and above the diagonal; ``grad_D`` counts
    against R (D = W - R).
    """
    return _build_backward(False, grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and C (with a base also
    V0^T V) as ``aux``; fp32.
    """
    return _build(True, X, signs, base, point, W)


def cayley_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]`` in X's dtype, zero on and above the diagonal of X[:r]; ``grad_D``
    counts against R (D = W - R).
    """
    return _build_backward(True, grad_R, grad_D, X, signs, base, aux)
