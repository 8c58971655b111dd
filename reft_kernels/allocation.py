"""What the operators return, allocated: shapes and dtypes in one place for every backend and for
the fakes.

An output that a call does not need is an empty tensor of its own (operators have a fixed arity and
no aliases).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.dtypes import accumulation_dtype


def num_selected_rows(hidden: Tensor, rows: Tensor | None) -> int:
    """N: how many entries a call works on."""
    return hidden.shape[0] if rows is None else rows.shape[0]


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Weights and small per-row tensors are read as dense rows."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def edit_saved(
    hidden: Tensor, rows: Tensor | None, write: Tensor, activation: str, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``saved_input [N, d]``, ``u`` and ``z [N, r]`` of an edit."""
    n, acc = num_selected_rows(hidden, rows), accumulation_dtype(hidden.dtype)
    small = (n, write.shape[-2])
    return (
        hidden.new_empty((n, hidden.shape[1]) if save and rows is not None else (0,)),
        hidden.new_empty(small if save else (0,), dtype=acc),
        hidden.new_empty(small if save and activation != "linear" else (0,), dtype=acc),
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
    """Gradients of read, read_bias, write, subtract_bias (as the weights) and coeff ``[N, r]``."""
    acc = accumulation_dtype(grad.dtype)

    def like(shape: tuple[int, ...], wanted: bool) -> Tensor:
        return grad.new_empty(shape if wanted else (0,), dtype=acc)

    return (
        like(write.shape, need_weights and read is not None),
        like(write.shape[:-1], need_weights),
        like(write.shape, need_weights),
        like(write.shape[:-1], need_weights and subtract_projection),
        like((num_selected_rows(grad, rows), write.shape[-2]), coeff is not None),
    )


def red_saved_input(hidden: Tensor, rows: Tensor | None, save: bool) -> Tensor:
    """``saved_input [N, d]`` of RED."""
    return hidden.new_empty((num_selected_rows(hidden, rows), hidden.shape[1]) if save else (0,))


def red_gradients(grad: Tensor, scale: Tensor, need_weights: bool) -> tuple[Tensor, Tensor]:
    """Gradients of scale and bias, as scale."""
    shape, acc = scale.shape if need_weights else (0,), accumulation_dtype(grad.dtype)
    return grad.new_empty(shape, dtype=acc), grad.new_empty(shape, dtype=acc)


def build(X: Tensor, base: Tensor | None, W: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """R ``[L, r, d]``, D of the same shape with W, and aux ``[L, 1, r, r]`` (2 with a base)."""
    layers, d, r = X.shape
    acc = accumulation_dtype(X.dtype)
    return (
        X.new_empty((layers, r, d), dtype=acc),
        X.new_empty((layers, r, d) if W is not None else (0,), dtype=acc),
        X.new_empty((layers, 1 if base is None else 2, r, r), dtype=acc),
    )


def no_build_gradient(X: Tensor) -> Tensor:
    """dL/dX ``[L, d, r]`` where neither R nor D has a gradient."""
    return torch.zeros_like(X, memory_format=torch.contiguous_format)
