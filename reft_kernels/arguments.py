"""Tuples of related arguments of an edit.

:class:`EditArguments` and :class:`EditBackwardArguments` list the arguments of the operators in the
order of their schemas (:mod:`reft_kernels.ops`), of the backends' functions and of the checks. A
call passes them as positional arguments, because PyTorch's dispatcher and autograd take no tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EditWeights(NamedTuple):
    """Weights of a low-rank edit, y = x + B^T (act(A x + c) - (B x + p)).

    With weight sets, every tensor has a leading dimension S.
    """

    read: Tensor | None  # A [r, d]; None for 0
    read_bias: Tensor | None  # c [r]; None for 0
    write: Tensor  # B [r, d]
    subtract_bias: Tensor | None  # p [r]; None for 0
    subtract_projection: bool  # whether B x is subtracted


class BuiltWeights(EditWeights):
    """Weights whose shapes, dtypes and devices were checked against each other.

    Modules check them once for all layers, and an edit then checks only that they fit the hidden
    states.

    Attributes:
        rounded: bf16 copies of the matrices of all layers, and the number of this layer, or None.
    """

    rounded: tuple[RoundedMatrices, int] | None = None


class RoundedMatrices:
    """bf16 copies of the read and write matrices of all layers, made when a layer needs them first.

    GPU kernels read them in the forward pass of bf16 hidden states: half the bytes of fp32 weights,
    and operands of the tensor cores as they are. Gradients are computed from the fp32 weights.

    Args:
        read: ``[L, ...]`` in fp32, or None.
        write: ``[L, ...]`` in fp32.
    """

    __slots__ = ("_kept", "_matrices")

    def __init__(self, read: Tensor | None, write: Tensor) -> None:
        self._matrices = (None if read is None else read.detach(), write.detach())
        self._kept: tuple[tuple, tuple, tuple] | None = None

    def layer(self, index: int) -> tuple[Tensor | None, Tensor]:
        """Return the copies of one layer, made anew if a matrix was modified in place."""
        read, write = self._matrices
        versions = (None if read is None else read._version, write._version)
        kept = self._kept  # read once, since another thread may replace it
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False), torch.no_grad():
                reads = (None,) * len(write) if read is None else read.to(torch.bfloat16).unbind(0)
                kept = self._kept = (versions, reads, write.to(torch.bfloat16).unbind(0))
        return kept[1][index], kept[2][index]


class RedWeights(NamedTuple):
    """Weights of RED, y = scale * x + bias."""

    scale: Tensor  # [d], or [S, d] with weight sets
    bias: Tensor  # same shape as scale


class RowSelection(NamedTuple):
    """Rows to edit, with the weight set and coefficients of each row."""

    rows: Tensor | None = None  # int32 [N], -1 skips; None for all rows
    weight_ids: Tensor | None = None  # int32 [N]; None for a single weight set
    coeff: Tensor | None = None  # [N, r]; None for 1


class EditArguments(NamedTuple):
    """Arguments of ``edit`` and ``edit_`` between ``hidden`` and ``save``."""

    rows: Tensor | None
    weight_ids: Tensor | None
    read: Tensor | None
    read_bias: Tensor | None
    write: Tensor
    subtract_bias: Tensor | None
    coeff: Tensor | None
    subtract_projection: bool
    activation: str  # canonical name


class EditBackwardArguments(NamedTuple):
    """Arguments of ``edit_backward`` and ``edit_backward_`` between ``grad`` and what is needed."""

    saved_input: Tensor  # [N, d], or the edit's output without rows
    u: Tensor  # [N, r]
    z: Tensor  # [N, r]; empty for a linear activation
    rows: Tensor | None
    weight_ids: Tensor | None
    read: Tensor | None
    write: Tensor
    coeff: Tensor | None
    subtract_projection: bool
    activation: str
