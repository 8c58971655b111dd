"""Conversion of pyreft's interventions to fused edits.

pyreft parametrizes R^T as base @ H(X) diag(signs) with
``torch.nn.utils.parametrizations.orthogonal``, and evaluates it three times per edit. Here H(X) is
computed for all layers in one call of :func:`reft_kernels.householder`, and each layer needs one
product with its base. The gradient is that of the same parameter X
(``rotate_layer.parametrizations.weight.original``). The drop-in classes of this package are
supported as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from pyreft.interventions import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.activations import ACT2FN

from reft_kernels import functional
from reft_kernels.activations import canonical_activation
from reft_kernels.arguments import EditWeights, RowSelection
from reft_kernels.autograd import apply_edit
from reft_kernels.checks import check_edit, num_rows_of
from reft_kernels.integrations.pyreft.interventions import ReftIntervention
from reft_kernels.integrations.torch_orthogonal import householder_chain, original_of, rotations

Edit = functools.partial[Tensor]
"""``edit(hidden, *, rows, inplace)``: a function of :mod:`reft_kernels.functional` with weights."""

_ACTIVATIONS = {
    type(ACT2FN[name]): canonical_activation(name)
    for name in (
        "linear",
        "relu",
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_pytorch_tanh",
        "silu",
        "swish",
        "tanh",
        "sigmoid",
    )
    if name in ACT2FN
}


def _loreft(intervention: LoreftIntervention, R: Tensor) -> Edit:
    source = intervention.learned_source
    return functools.partial(
        functional.loreft,
        R=R,
        W=source.weight,
        b=source.bias,
        activation=activation_of(intervention),
    )


def _direft(intervention: DireftIntervention, R: Tensor) -> Edit:
    source = intervention.learned_source
    return functools.partial(
        functional.direft,
        R=R,
        W=source.weight,
        b=source.bias,
        activation=activation_of(intervention),
    )


def _noreft(intervention: NoreftIntervention, R: None) -> Edit:
    source, proj = intervention.learned_source, intervention.proj_layer
    return functools.partial(
        functional.noreft,
        W2=proj.weight,
        W1=source.weight,
        b=source.bias,
        b2=proj.bias,
        activation=activation_of(intervention),
    )


def _nodireft(intervention: NodireftIntervention, R: None) -> Edit:
    source = intervention.learned_source  # like pyreft, this does not use the bias of proj_layer
    return functools.partial(
        functional.nodireft,
        W2=intervention.proj_layer.weight,
        W1=source.weight,
        b=source.bias,
        activation=activation_of(intervention),
    )


def _consreft(intervention: ConsreftIntervention, R: Tensor) -> Edit:
    return functools.partial(functional.consreft, R=R, s=intervention.learned_source)


def _lobireft(intervention: LobireftIntervention, R: Tensor) -> Edit:
    return functools.partial(functional.lobireft, R=R, s=intervention.learned_source)


def _drop_in(intervention: ReftIntervention, R: None) -> Edit:
    scale = intervention.subspace_coeff
    weights = intervention.edit_weights()
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=weights.write.device).expand(
            weights.write.shape[0]
        )
    return functools.partial(
        _edit_by_weights, **weights._asdict(), scale=scale, activation=activation_of(intervention)
    )


def _edit_by_weights(
    hidden: Tensor,
    *,
    read: Tensor | None,
    read_bias: Tensor,
    write: Tensor,
    subtract_bias: Tensor | None,
    subtract_projection: bool,
    scale: Tensor | None,
    activation: str,
    rows: Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Apply an edit with the fields of :class:`EditWeights` as keyword arguments."""
    matrices = {"write": write} if read is None else {"write": write, "read": read}
    check_edit(hidden, matrices, {"read_bias": read_bias}, rows, activation, None, None)
    count = num_rows_of(hidden) if rows is None else rows.shape[0]
    coeff = None if scale is None else scale.expand(count, -1)
    weights = EditWeights(read, read_bias, write, subtract_bias, subtract_projection)
    return apply_edit(hidden, weights, RowSelection(rows, None, coeff), activation, inplace)


SHIPPED: dict[type[nn.Module], Callable[..., Edit]] = {
    LoreftIntervention: _loreft,
    NoreftIntervention: _noreft,
    ConsreftIntervention: _consreft,
    LobireftIntervention: _lobireft,
    DireftIntervention: _direft,
    NodireftIntervention: _nodireft,
}
"""Functions that make the edit of pyreft's classes, and of subclasses with the same ``forward``."""


def _maker(intervention: nn.Module) -> Callable[..., Edit] | None:
    """Return the function that makes an intervention's edit, or None if it is not supported."""
    makers: dict[type[nn.Module], Callable[..., Edit]] = {**SHIPPED, ReftIntervention: _drop_in}
    for cls, maker in makers.items():
        if isinstance(intervention, cls) and type(intervention).forward is cls.forward:
            return maker
    return None


def activation_of(intervention: nn.Module) -> str:
    """Return the canonical name of an intervention's ``act_fn``; "linear" if it has none.

    Raises:
        ValueError: If the activation is not supported.
    """
    act_fn = getattr(intervention, "act_fn", None)
    if act_fn is None:
        return "linear"
    if type(act_fn) not in _ACTIVATIONS:
        raise ValueError(
            f"act_fn: got {type(act_fn).__name__}, expected what transformers' ACT2FN gives for "
            "linear, relu, gelu, gelu_new, "
            "silu, tanh or sigmoid"
        )
    return _ACTIVATIONS[type(act_fn)]


def check_intervention(key: str, intervention: nn.Module) -> None:
    """Check that :func:`edits_of` supports an intervention.

    Args:
        key: Its key, for error messages.
        intervention: The intervention.

    Raises:
        TypeError: If its class is not one of pyreft or this package, or overrides ``forward``.
        ValueError: If its activation is not supported.
    """
    if _maker(intervention) is None:
        names = ", ".join(cls.__name__ for cls in SHIPPED)
        raise TypeError(
            f"reft_model: intervention {key!r} is "
            f"{type(intervention).__module__}.{type(intervention).__qualname__}, expected "
            f"one of pyreft's {names}, this package's class of that name, or a subclass with its "
            "forward"
        )
    try:
        activation_of(intervention)
    except ValueError as error:
        raise ValueError(f"reft_model: intervention {key!r}, {error}") from None


def _rotations(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Compute R ``[r, d]`` of rotate layers, in fp32 (fp64 for fp64 parameters), differentiable.

    Layers of the same shape share one Householder call. A layer with another parametrization
    (PyTorch uses the matrix exponential for a square R) or none is evaluated by itself.
    """
    layers = list(layers)
    result: dict[int, Tensor] = {}
    groups: dict[tuple, dict[int, ParametrizationList]] = {}
    for index, layer in enumerate(layers):
        chain = householder_chain(layer)
        if chain is None:
            assert isinstance(layer.weight, Tensor)
            result[index] = layer.weight.mT
        else:
            X = original_of(chain)
            groups.setdefault((X.shape, X.dtype, X.device), {})[index] = chain
    for chains in groups.values():
        X = torch.stack([original_of(chain) for chain in chains.values()])
        # PyTorch truncates the signs on the diagonal to integers (weight decay makes them 0), and
        # pyreft's results are to be reproduced
        signs = X.detach().diagonal(dim1=-2, dim2=-1).int()
        result |= zip(chains, rotations([*chains.values()], X, signs), strict=True)
    return [result[i] for i in range(len(layers))]


def edits_of(interventions: Mapping[str, nn.Module]) -> dict[str, Edit]:
    """Return the edit of each intervention with its current weights.

    All rotations are computed together.

    Args:
        interventions: The interventions by key.

    Raises:
        TypeError: If the class of an intervention is not supported.
        ValueError: If its activation is not supported.
    """
    for key, intervention in interventions.items():
        check_intervention(key, intervention)
    rotate_layers: dict[nn.Module, nn.Module] = {}
    for intervention in interventions.values():
        layer = getattr(intervention, "rotate_layer", None)
        if isinstance(layer, nn.Module) and not isinstance(intervention, ReftIntervention):
            rotate_layers[intervention] = layer
    R = dict(zip(rotate_layers, _rotations(rotate_layers.values()), strict=True))
    edits = {}
    for key, intervention in interventions.items():
        maker = _maker(intervention)
        assert maker is not None  # checked above
        edits[key] = maker(intervention, R.get(intervention))
    return edits


def dropout_of(intervention: nn.Module) -> nn.Module | None:
    """Return the dropout module of an intervention, or None if it is inactive.

    It acts on the whole edited state. Its own training mode is used, because ``train`` and ``eval``
    of a pyreft model only affect the base model.
    """
    dropout = getattr(intervention, "dropout", None)
    if type(dropout) is nn.Dropout and (dropout.p == 0.0 or not dropout.training):
        return None
    return dropout
