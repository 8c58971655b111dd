"""Allocation of operator outputs.

All backends and the fake (meta) implementations allocate their outputs here, so that shapes and
dtypes agree. Operators return a fixed number of tensors and no aliases; an output that a call does
not need is a new tensor of shape ``[0]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.dtypes import accumulation_dtype

_NOTHING: tuple[int, ...] = (0,)


def num_selected_rows(hidden: Tensor, rows: Tensor | None) -> int:
    """Return N, the number of rows that a call processes, skipped entries included."""
    return hidden.shape[0] if rows is None else rows.shape[0]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Return ``tensor`` in contiguous layout, copied only if needed; None for None."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def edit_saved(
    hidden: Tensor, rows: Tensor | None, write: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the tensors that an edit saves for its backward pass.

    Args:
        hidden: ``[M, d]``.
        rows: int32 ``[N]`` or None.
        write: ``[r, d]`` or ``[S, r, d]``.
        activation: Canonical activation name.
        save: Whether a backward pass will follow.

    Returns:
        ``saved_input [N, d]`` in the dtype of ``hidden`` (only with ``rows``), and ``u`` and ``z``
        ``[N, r]`` in the accumulation dtype (``z`` only for a nonlinear activation). Without
        ``save`` all three are empty.
    """
    acc, new = accumulation_dtype(hidden.dtype), hidden.new_empty
    if not save:
        return new(_NOTHING), new(_NOTHING, dtype=acc), new(_NOTHING, dtype=acc)
    n = num_selected_rows(hidden, rows)
    small = (n, write.shape[-2])
    return (
        new(_NOTHING if rows is None else (n, hidden.shape[1])),
        new(small, dtype=acc),
        new(_NOTHING if activation == "linear" else small, dtype=acc),
    )


def edit_gradients(
    grad: Tensor,
    rows: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    subtract_projection: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the gradients of an edit, in the accumulation dtype.

    Returns:
        Gradients of ``read``, ``read_bias``, ``write`` and ``subtract_bias``, shaped like the
        weights, and of ``coeff``, ``[N, r]``. The gradient of an absent argument is empty, as are
        all weight gradients without ``need_weights``.
    """
    acc, new = accumulation_dtype(grad.dtype), grad.new_empty
    matrix = write.shape if need_weights else _NOTHING
    vector = matrix[:-1] if need_weights else _NOTHING
    small = _NOTHING
    if coeff is not None:
        small = (num_selected_rows(grad, rows), write.shape[-2])
    return (
        new(_NOTHING if read is None else matrix, dtype=acc),
        new(vector, dtype=acc),
        new(matrix, dtype=acc),
        new(vector if subtract_projection else _NOTHING, dtype=acc),
        new(small, dtype=acc),
    )


def red_saved_input(hidden: Tensor, rows: Tensor | None, save: bool) -> Tensor:
    """Allocate the input rows ``[N, d]`` that RED saves for its backward pass, or ``[0]``."""
    return hidden.new_empty((num_selected_rows(hidden, rows), hidden.shape[1]) if save else (0,))


def red_gradients(grad: Tensor, scale: Tensor, need_weights: bool) -> tuple[Tensor, Tensor]:
    """Allocate the gradients of RED's ``scale`` and ``bias``, both shaped like ``scale``."""
    shape, acc = scale.shape if need_weights else (0,), accumulation_dtype(grad.dtype)
    return grad.new_empty(shape, dtype=acc), grad.new_empty(shape, dtype=acc)


def build(X: Tensor, base: Tensor | None, W: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the outputs of the ``householder`` and ``cayley`` operators.

    Args:
        X: ``[L, d, r]``.
        base: ``[L, d, r]`` or None.
        W: ``[L, r, d]`` or None.

    Returns:
        R ``[L, r, d]``; D ``[L, r, d]``, empty without ``W``; and aux ``[L, 1, r, r]``, or
        ``[L, 2, r, r]`` with ``base``. All are in the accumulation dtype.
    """
    layers, d, r = X.shape
    acc = accumulation_dtype(X.dtype)
    return (
        X.new_empty((layers, r, d), dtype=acc),
        X.new_empty((layers, r, d) if W is not None else (0,), dtype=acc),
        X.new_empty((layers, 1 if base is None else 2, r, r), dtype=acc),
    )


def no_build_gradient(X: Tensor) -> Tensor:
    """Return a zero dL/dX ``[L, d, r]``, for a backward pass in which R and D have no gradient."""
    return torch.zeros_like(X, memory_format=torch.contiguous_format)
