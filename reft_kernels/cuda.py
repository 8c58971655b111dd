"""The ``cuda`` backend: CUDA C++ kernels (``csrc/cuda``) for edits and orthonormal maps.

The kernels are built at install time with ``REFT_KERNELS_BUILD_CUDA=1`` into ``_native_cuda.so`` in
this directory; they use PyTorch's stable ABI. Each function takes and returns the same tensors as
the function of that name in :mod:`reft_kernels.reference`. ``edit`` launches one kernel,
``edit_backward`` at most two, and each orthonormal map and its backward one for all layers. Sums
have a fixed order, so results are bit-identical between runs.

``REFT_KERNELS_CUDA_LIBRARY`` is the path of another build of the library. The emulated build in
``tests/cuda/emulation`` runs the kernels on CPU tensors only, for tests.
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
_ALL_ROWS_RANK = 16  # the largest rank of the kernel for all rows
_RANK_MULTIPLE = 8  # edit_backward pads the rank dimension of its temporary tensor to this


@functools.cache
def _why_not_loaded() -> str | None:
    """Load the library on the first call; return None, or the reason why it cannot be loaded."""
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
    """Return whether the library is an emulated build.

    Only a library named by ``REFT_KERNELS_CUDA_LIBRARY`` can be emulated. Without that variable
    this returns False and does not load the library.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    return (
        bool(named)
        and _why_not_loaded() is None
        and hasattr(torch.ops.reft_kernels_cuda, "emulated")
    )


def unsupported_reason(operator: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot run an operator, or None if it can.

    Calls of ``edit`` and ``edit_backward`` that the kernels do not serve, and RED, are supported by
    calling Triton.

    Args:
        operator: An operator.
        device_type: Device type of the tensors.
        dtype: Dtype of the tensors.
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
    """Return the function for a call that the CUDA kernels do not support.

    It is Triton's, or the reference if Triton is not installed or the library is emulated.
    """
    name = "reference" if emulated() or importlib.util.find_spec("triton") is None else "triton"
    return getattr(importlib.import_module(f"reft_kernels.{name}"), operator)


def _dense_channels(*tensors: Tensor | None) -> bool:
    return all(t is None or t.dim() < 2 or t.shape[1] <= 1 or t.stride(1) == 1 for t in tensors)


def _small(tensor: Tensor | None) -> Tensor | None:
    """Return ``tensor`` contiguous and in a supported dtype; copied only if needed."""
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
    """Compute :func:`reft_kernels.reference.edit` in one kernel launch.

    Triton is called instead if channels are strided, and without ``rows`` for fp32, for
    ``weight_ids``, for ranks over 16 (8 if B x needs a product of its own), for d over 8192 or not
    a multiple of 8, for unaligned rows, and on sm_80 for d over 1024.

    Raises:
        ValueError: If the rank is not between 1 and 256.
    """
    served = _dense_channels(source, out) and (
        rows is not None
        or weight_ids is None
        and source.dtype != torch.float32
        and write.shape[-2] <= _ALL_ROWS_RANK
    )
    if served:
        _check_rank(write)
        saved_input, u, z = allocation.edit_saved(source, rows, write, activation, save)
        if allocation.num_selected_rows(source, rows) > 0:
            native_read, native_write = _weights(source, read, write)
            served = torch.ops.reft_kernels_cuda.edit_forward.default(
                source,
                out,
                contiguous(rows),
                contiguous(weight_ids),
                native_read,
                _small(read_bias),
                native_write,
                _small(subtract_bias),
                _small(coeff),
                subtract_projection,
                ACTIVATIONS.index(activation),
                saved_input,
                u,
                z,
            )
        if served:
            return saved_input, u, z
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
    """Compute :func:`reft_kernels.reference.edit_backward` in at most two kernel launches.

    One launch suffices if only the gradient of ``coeff`` is needed. Without ``rows``, or if
    channels are strided, Triton is called instead.

    Raises:
        ValueError: If the rank is not between 1 and 256.
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
    """Compute :func:`reft_kernels.reference.red` by calling Triton."""
    return _elsewhere("red")(source, *args)


def red_backward(grad: Tensor, *args) -> tuple[Tensor, Tensor]:
    """Compute :func:`reft_kernels.reference.red_backward` by calling Triton."""
    return _elsewhere("red_backward")(grad, *args)


def _single(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return the tensors contiguous and in fp32; copied only if needed."""
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
    """Compute the Householder map for all layers in one kernel launch.

    Args:
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        point: ``[L, r, d]``, given if and only if ``base`` is.
        W: ``[L, r, d]`` or None.

    Returns:
        R ``[L, r, d]``; D = W - R ``[L, r, d]``, empty without ``W``; and aux, which is T
        ``[L, 1, r, r]``, or T and V0^T V ``[L, 2, r, r]`` with ``base``. All are fp32.

    Raises:
        ValueError: If r is not between 1 and min(d, 256).
    """
    return _build(False, X, signs, base, point, W)


def householder_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """Compute the gradient of X for :func:`householder`.

    Args:
        grad_R: ``[L, r, d]`` or None.
        grad_D: ``[L, r, d]`` or None. It is subtracted from ``grad_R``, because D = W - R.
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        aux: The tensor that :func:`householder` returned.

    Returns:
        ``[L, d, r]`` in the dtype of X, zero on and above the diagonal.
    """
    return _build_backward(False, grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """Compute the Cayley map for all layers in one kernel launch.

    Arguments, results and errors are those of :func:`householder`, with C instead of T in ``aux``.
    """
    return _build(True, X, signs, base, point, W)


def cayley_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """Compute the gradient of X for :func:`cayley`.

    Arguments and result are those of :func:`householder_backward`.
    """
    return _build_backward(True, grad_R, grad_D, X, signs, base, aux)
