"""The ReFT edits as differentiable functions of tensors.

Each function edits the selected rows of ``hidden`` and returns a tensor of the same shape and
dtype. The functions share these arguments:

    hidden      ``[..., d]``, fp32, bf16, fp16 or fp64.
    weights     ``[r, d]`` matrices and ``[r]`` vectors of any floating-point dtype (usually fp32),
                with 1 <= r <= 256. Sums are accumulated in fp32 (fp64 for fp64 ``hidden``).
    rows        int32 ``[N]``: rows of ``hidden.view(-1, d)`` to edit, each at most once; -1 skips
                an entry. None edits all rows. See :mod:`reft_kernels.positions`.
    activation  "linear", "relu", "gelu", "gelu_tanh", "silu", "tanh" or "sigmoid", or a Hugging
                Face alias such as "gelu_new".
    coeff       ``[N, r]``: multiplies the update in the r-dimensional subspace, per row. Used for
                subspace selection, scaling and dropout.
    weight_ids  int32 ``[N]``: row n uses weight set ``weight_ids[n]``. The weights then have a
                leading dimension S.
    inplace     Edit ``hidden`` itself. The cost then depends only on the number of selected rows.
    set_ids     Deprecated name of ``weight_ids``.

All functions raise TypeError or ValueError for invalid arguments before they launch a kernel.

Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equations 2 and 3
and the appendix.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from reft_kernels.activations import ACTIVATIONS, canonical_activation
from reft_kernels.arguments import EditWeights, RedWeights, RowSelection
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
    """Parameter names of a public function's weights, used in error messages.

    ``read`` is None if the function has no such weight.
    """

    write: str
    read: str | None
    read_bias: str


_READS_W, _READS_W1, _CONSTANT = (
    _Names("R", "W", "b"),
    _Names("W2", "W1", "b"),
    _Names("R", None, "s"),
)


def _check(
    names: _Names, hidden: Tensor, weights: EditWeights, chosen: RowSelection, activation: str
) -> None:
    """Check the arguments of an edit; errors name the parameters of the public function."""
    matrices: dict[str, Tensor | None] = {names.write: weights.write}
    biases: dict[str, Tensor | None] = {names.read_bias: weights.read_bias}
    if names.read is not None:
        matrices[names.read] = weights.read
    if weights.subtract_bias is not None:
        biases["b2"] = weights.subtract_bias
    check_edit(hidden, matrices, biases, chosen.rows, activation, chosen.coeff, chosen.weight_ids)


def _edit(
    names: _Names,
    hidden: Tensor,
    weights: EditWeights,
    chosen: RowSelection,
    activation: str | None,
    inplace: bool,
) -> Tensor:
    """Apply one edit.

    The operators check their arguments. If one raises, the checks run again here, so that the error
    names the parameters of the public function.
    """
    if activation not in ACTIVATIONS:
        activation = canonical_activation(activation)
    missing = weights.read_bias is None or (weights.read is None and names.read is not None)
    if missing or not operators_check(hidden, chosen.rows, chosen.weight_ids):
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
    """Apply LoReFT: h + R^T (act(W h + b) - R h).

    Args:
        hidden: ``[..., d]``.
        R: ``[r, d]``, or ``[S, r, d]`` with ``weight_ids``. Its rows should be orthonormal; this is
            not checked.
        W: Same shape as R.
        b: ``[r]``, or ``[S, r]`` with ``weight_ids``.
        rows: See the module documentation.
        activation: See the module documentation.
        coeff: See the module documentation.
        weight_ids: See the module documentation.
        inplace: See the module documentation.
        set_ids: Deprecated name of ``weight_ids``.

    Returns:
        The edited hidden states, with the shape and dtype of ``hidden``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or values.

    Source: Wu et al. 2024, equation 2.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W, b, R, None, True), RowSelection(rows, weight_ids, coeff)
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
    """Apply DiReFT with orthonormal R: h + R^T act(W h + b).

    This is LoReFT without the subtracted projection. For the paper's equation 3, whose matrices are
    unconstrained, see :func:`nodireft`. Arguments and errors are those of :func:`loreft`.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W, b, R, None, False), RowSelection(rows, weight_ids, coeff)
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
    """Apply NodiReFT, the paper's DiReFT: h + W2^T act(W1 h + b).

    Args:
        hidden: ``[..., d]``.
        W2: ``[r, d]``, or ``[S, r, d]`` with ``weight_ids``.
        W1: Same shape as W2.
        b: ``[r]``, or ``[S, r]`` with ``weight_ids``.
        rows: See the module documentation.
        activation: See the module documentation.
        coeff: See the module documentation.
        weight_ids: See the module documentation.
        inplace: See the module documentation.
        set_ids: Deprecated name of ``weight_ids``.

    Returns:
        The edited hidden states, with the shape and dtype of ``hidden``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or values.

    Source: Wu et al. 2024, equation 3.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W1, b, W2, None, False), RowSelection(rows, weight_ids, coeff)
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
    """Apply NoReFT: h + W2^T (act(W1 h + b) - (W2 h + b2)).

    ``b2`` is ``[r]`` (``[S, r]`` with ``weight_ids``), or None for zero. The other arguments and
    errors are those of :func:`nodireft`.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(W1, b, W2, b2, True), RowSelection(rows, weight_ids, coeff)
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
    """Apply ConsReFT: h + R^T (act(s) - R h).

    ``R`` is ``[r, d]`` and ``s`` is ``[r]`` (``[S, r, d]`` and ``[S, r]`` with ``weight_ids``). The
    other arguments and errors are those of :func:`loreft`.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(None, s, R, None, True), RowSelection(rows, weight_ids, coeff)
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
    """Apply LobiReFT: h + R^T act(s), which adds the same vector to every selected row.

    ``R`` is ``[r, d]`` and ``s`` is ``[r]`` (``[S, r, d]`` and ``[S, r]`` with ``weight_ids``). The
    other arguments and errors are those of :func:`loreft`.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    weights, chosen = EditWeights(None, s, R, None, False), RowSelection(rows, weight_ids, coeff)
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
    """Apply RED: scale * h + bias, elementwise.

    Args:
        hidden: ``[..., d]``.
        scale: ``[d]``, or ``[S, d]`` with ``weight_ids``.
        bias: Same shape as ``scale``.
        rows: See the module documentation.
        weight_ids: See the module documentation.
        inplace: See the module documentation.
        set_ids: Deprecated name of ``weight_ids``.

    Returns:
        The edited hidden states, with the shape and dtype of ``hidden``.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape, device or values.

    Source: Wu et al., "Advancing Parameter Efficiency in Fine-tuning via Representation Editing",
    2024.
    """
    if set_ids is not None:
        weight_ids = renamed_argument("set_ids", set_ids, "weight_ids", weight_ids)
    if not operators_check(hidden, rows, weight_ids):
        check_red(hidden, scale, bias, rows, weight_ids)
    try:
        return apply_red(hidden, RedWeights(scale, bias), RowSelection(rows, weight_ids), inplace)
    except Exception as error:
        check_red(hidden, scale, bias, rows, weight_ids)
        raise restored(error) from None
