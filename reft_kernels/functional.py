"""The ReFT family as differentiable functions of plain tensors.

Each function edits the selected rows of ``hidden [..., d]`` (fp32, bf16, fp16 or fp64) and returns
a tensor of the same shape and dtype. Weights may have any floating dtype (fp32 is usual); sums are
carried in fp32. The keyword arguments they share:

    rows        int32 ``[N]``, row numbers into ``hidden.view(-1, d)``, -1 skipped, none twice (see
                :mod:`positions`); None: all
    activation  linear, relu, gelu, gelu_tanh, silu, tanh, sigmoid (Hugging Face names are
                understood)
    coeff       ``[N, r]``, multiplies u for each row: a choice of subspaces, a scale, a dropout
                mask
    weight_ids  int32 ``[N]``: row n uses weight set ``weight_ids[n]`` of weights with a leading
                dimension S
    inplace     edit ``hidden`` itself: the cost does not depend on the rows that are not selected
    set_ids     deprecated name of weight_ids

All raise TypeError or ValueError, naming the argument, what came and what was expected, before
anything is launched.
Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and 3
and appendix.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reft_kernels.activations import ACTIVATIONS, canonical_activation
from reft_kernels.arguments import EditWeights, RedWeights, Selection
from reft_kernels.autograd import apply_edit, apply_red, operators_check
from reft_kernels.checks import check_edit, check_red
from reft_kernels.deprecation import renamed_argument
from reft_kernels.ops import restored
from reft_kernels.parametrization import cayley, householder

__all__ = [
    "loreft",
    "direft",
    "nodireft",
    "noreft",
    "consreft",
    "lobireft",
    "red",
    "householder",
    "cayley",
]


class _Names(NamedTuple):
    """What a function calls its weights, for its errors; ``read`` is None where it has none."""

    write: str
    read: str | None
    read_bias: str


_READS_W, _READS_W1, _CONSTANT = (
    _Names("R", "W", "b"),
    _Names("W2", "W1", "b"),
    _Names("R", None, "s"),
)


def _check(
    names: _Names, hidden: Tensor, weights: EditWeights, chosen: Selection, activation: str
) -> None:
    """Say what is wrong in the function's words."""
    matrices, biases = {names.write: weights.write}, {names.read_bias: weights.read_bias}
    if names.read is not None:
        matrices[names.read] = weights.read
    if weights.subtract_bias is not None:
        biases["b2"] = weights.subtract_bias
    check_edit(hidden, matrices, biases, chosen.rows, activation, chosen.coeff, chosen.weight_ids)


def _edit(
    names: _Names,
    hidden: Tensor,
    weights: EditWeights,
    chosen: Selection,
    activation: str | None,
    inplace: bool,
) -> Tensor:
    """One edit. The operators check their arguments; what is wrong is then said again, in the
    function's words.
    """
    if activation not in ACTIVATIONS:
        activation = canonical_activation(activation)
    missing = weights.read_bias is None or (weights.read is None and names.read is not None)
    if missing or not operators_check(hidden):
        _check(names, hidden, weights, chosen, activation)
    try:
        return apply_edit(hidden, weights, chosen, activation, inplace)
    except Exception as error:
        _check(names, hidden, weights, chosen, activation)
        raise restored(error) from None


def loreft(
    hidden: Tensor,
    R: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """LoReFT: h + R^T (act(W h + b) - R h); R, W ``[r, d]``, b ``[r]`` (``[S, r, d]``, ``[S,
    r]`` with ``weight_ids``).
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W, b, R, None, True), Selection(rows, weight_ids, coeff)
    return _edit(_READS_W, hidden, weights, chosen, activation, inplace)


def direft(
    hidden: Tensor,
    R: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """DiReFT, the ablation of LoReFT: h + R^T act(W h + b); shapes as :func:`loreft`."""
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W, b, R, None, False), Selection(rows, weight_ids, coeff)
    return _edit(_READS_W, hidden, weights, chosen, activation, inplace)


def nodireft(
    hidden: Tensor,
    W2: Tensor,
    W1: Tensor,
    b: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """NodiReFT (the paper's "DiReFT"): h + W2^T act(W1 h + b); W1, W2 ``[r, d]``, unconstrained."""
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W1, b, W2, None, False), Selection(rows, weight_ids, coeff)
    return _edit(_READS_W1, hidden, weights, chosen, activation, inplace)


def noreft(
    hidden: Tensor,
    W2: Tensor,
    W1: Tensor,
    b: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    b2: Tensor | None = None,
    set_ids: Tensor | None = None,
) -> Tensor:
    """NoReFT: h + W2^T (act(W1 h + b) - (W2 h + b2)); W1, W2 ``[r, d]``, unconstrained, b2
    ``[r]`` or None.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W1, b, W2, b2, True), Selection(rows, weight_ids, coeff)
    return _edit(_READS_W1, hidden, weights, chosen, activation, inplace)


def consreft(
    hidden: Tensor,
    R: Tensor,
    s: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """ConsReFT: h + R^T (act(s) - R h), a constant source; R ``[r, d]``, s ``[r]``."""
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(None, s, R, None, True), Selection(rows, weight_ids, coeff)
    return _edit(_CONSTANT, hidden, weights, chosen, activation, inplace)


def lobireft(
    hidden: Tensor,
    R: Tensor,
    s: Tensor,
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """LobiReFT: h + R^T act(s), a constant write; R ``[r, d]``, s ``[r]``."""
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(None, s, R, None, False), Selection(rows, weight_ids, coeff)
    return _edit(_CONSTANT, hidden, weights, chosen, activation, inplace)


def red(
    hidden: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    weight_ids: Tensor | None = None,
    inplace: bool = False,
    set_ids: Tensor | None = None,
) -> Tensor:
    """RED: scale * h + bias, elementwise; scale, bias ``[d]`` (``[S, d]`` with ``weight_ids``).

    Source: Wu et al., "Advancing Parameter Efficiency in Fine-tuning via Representation Editing",
    2024.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    if not operators_check(hidden):
        check_red(hidden, scale, bias, rows, weight_ids)
    try:
        return apply_red(hidden, RedWeights(scale, bias), Selection(rows, weight_ids), inplace)
    except Exception as error:
        check_red(hidden, scale, bias, rows, weight_ids)
        raise restored(error) from None
