"""pyreft's interventions as the engine's edits: which function computes each, and their rotations
all at once.

pyreft keeps R as a tall matrix with orthonormal columns, parametrized as base @ H(X) diag(signs) by
``torch.nn.utils.parametrizations.orthogonal``: H(X) is what :func:`reft_kernels.householder`
builds, for all layers in one call, so that one product with the base remains of the three
evaluations that pyreft makes. The gradient reaches the same ``X``
(``rotate_layer.parametrizations.weight.original``). This package's classes of the same names are
understood too.
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
from transformers.activations import ACT2FN

from reft_kernels import functional
from reft_kernels.activations import canonical_activation
from reft_kernels.arguments import EditWeights, Selection
from reft_kernels.autograd import apply_edit
from reft_kernels.checks import check_edit, num_rows_of
from reft_kernels.integrations.pyreft.interventions import ReftIntervention
from reft_kernels.integrations.torch_orthogonal import householder_chain, rotations

Edit = Callable[..., Tensor]
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


def _loreft(own: LoreftIntervention, R: Tensor) -> Edit:
    source = own.learned_source
    return functools.partial(
        functional.loreft, R=R, W=source.weight, b=source.bias, activation=activation_of(own)
    )


def _direft(own: DireftIntervention, R: Tensor) -> Edit:
    source = own.learned_source
    return functools.partial(
        functional.direft, R=R, W=source.weight, b=source.bias, activation=activation_of(own)
    )


def _noreft(own: NoreftIntervention, R: None) -> Edit:
    source, proj = own.learned_source, own.proj_layer
    return functools.partial(
        functional.noreft,
        W2=proj.weight,
        W1=source.weight,
        b=source.bias,
        b2=proj.bias,
        activation=activation_of(own),
    )


def _nodireft(own: NodireftIntervention, R: None) -> Edit:
    source = own.learned_source  # the bias of proj_layer is not used by pyreft either
    return functools.partial(
        functional.nodireft,
        W2=own.proj_layer.weight,
        W1=source.weight,
        b=source.bias,
        activation=activation_of(own),
    )


def _consreft(own: ConsreftIntervention, R: Tensor) -> Edit:
    return functools.partial(functional.consreft, R=R, s=own.learned_source)


def _lobireft(own: LobireftIntervention, R: Tensor) -> Edit:
    return functools.partial(functional.lobireft, R=R, s=own.learned_source)


def _drop_in(own: ReftIntervention, R: None) -> Edit:
    scale = own.subspace_coeff
    weights = own.edit_weights()
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=torch.float32, device=weights.write.device).expand(
            weights.write.shape[0]
        )
    return functools.partial(
        _edit_by_weights, **weights._asdict(), scale=scale, activation=activation_of(own)
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
    matrices = {"write": write} if read is None else {"write": write, "read": read}
    check_edit(hidden, matrices, {"read_bias": read_bias}, rows, activation, None, None)
    count = num_rows_of(hidden) if rows is None else rows.shape[0]
    coeff = None if scale is None else scale.expand(count, -1)
    weights = EditWeights(read, read_bias, write, subtract_bias, subtract_projection)
    return apply_edit(hidden, weights, Selection(rows, None, coeff), activation, inplace)


SHIPPED: dict[type[nn.Module], Callable[..., Edit]] = {
    LoreftIntervention: _loreft,
    NoreftIntervention: _noreft,
    ConsreftIntervention: _consreft,
    LobireftIntervention: _lobireft,
    DireftIntervention: _direft,
    NodireftIntervention: _nodireft,
}
"""pyreft's classes; a subclass that leaves ``forward`` as it is counts as its parent."""


def _maker(intervention: nn.Module) -> Callable[..., Edit] | None:
    for cls, maker in (*SHIPPED.items(), (ReftIntervention, _drop_in)):
        if isinstance(intervention, cls) and type(intervention).forward is cls.forward:
            return maker
    return None


def activation_of(intervention: nn.Module) -> str:
    """The engine's name of an intervention's ``act_fn`` (linear where it has none).

    Raises:
        ValueError: an activation that the engine does not have.
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
    """Refuse what :func:`edits_of` cannot serve.

    Raises:
        TypeError: a class of neither pyreft nor this package, or one with a forward of its own.
            ValueError: another activation.
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
    """R ``[r, d]`` of each rotate layer, differentiable, in fp32 (fp64 for fp64 parameters).

    Layers of one shape share one householder call. Another parametrization (torch takes the matrix
    exponential for a square R, r = d) or none is evaluated as it stands, once.
    """
    layers = list(layers)
    found: dict[int, Tensor] = {}
    groups: dict[tuple, list[int]] = {}
    chains = [householder_chain(layer) for layer in layers]
    for index, chain in enumerate(chains):
        if chain is None:
            found[index] = layers[index].weight.mT
        else:
            X = chain.original
            groups.setdefault((X.shape, X.dtype, X.device), []).append(index)
    for members in groups.values():
        X = torch.stack([chains[i].original for i in members])
        # torch truncates the diagonal to integers, so that weight decay makes zeros of the signs:
        # pyreft's numbers are kept
        signs = X.detach().diagonal(dim1=-2, dim2=-1).int()
        found |= zip(members, rotations([chains[i] for i in members], X, signs), strict=True)
    return [found[i] for i in range(len(layers))]


def edits_of(interventions: Mapping[str, nn.Module]) -> dict[str, Edit]:
    """The edit of each intervention, by key, with its present weights; all rotations in one build.

    Raises:
        TypeError, ValueError: as :func:`check_intervention`, where an intervention was replaced
            since.
    """
    for key, own in interventions.items():
        check_intervention(key, own)
    shipped = [own for own in interventions.values() if not isinstance(own, ReftIntervention)]
    rotating = list(dict.fromkeys(own for own in shipped if hasattr(own, "rotate_layer")))
    R = dict(zip(rotating, _rotations(own.rotate_layer for own in rotating), strict=True))
    return {key: _maker(own)(own, R.get(own)) for key, own in interventions.items()}


def dropout_of(intervention: nn.Module) -> nn.Module | None:
    """An intervention's dropout, which acts on the whole edited state h + delta; None where it is
    off.

    Its own training flag decides: pyreft's ``train`` and ``eval`` reach the base model alone.
    """
    dropout = getattr(intervention, "dropout", None)
    if type(dropout) is nn.Dropout and (dropout.p == 0.0 or not dropout.training):
        return None
    return dropout
