"""Tuples of related arguments of an edit.

:class:`EditArguments` and :class:`EditBackwardArguments` list the arguments of the operators in the
order of their schemas (:mod:`reft_kernels.ops`), of the backends' functions and of the checks. A
call passes them as positional arguments, because PyTorch's dispatcher and autograd take no tuples.
"""

from __future__ import annotations

from typing import NamedTuple

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
    """

    __slots__ = ()


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
