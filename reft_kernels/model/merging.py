"""Merges edits into weights, if the result is exact.

An edit of a linear layer's output, at all positions and with a linear activation, is affine:
h -> M h + v. With h = W0 x + b0 it merges exactly into weight M W0 and bias M b0 + v. Other edits
cannot be merged: an edit of some positions depends on the position, an edit of the residual stream
also changes what earlier layers wrote, and a nonlinear activation is not affine.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from reft_kernels.interventions import EditWeights, Intervention, RedWeights
from reft_kernels.model.components import Target
from reft_kernels.positions import Spec


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int)


def why_not(module: nn.Module, target: Target, spec: Spec, activation: str) -> str | None:
    """The reason why an edit does not merge exactly into ``module``, or None if it does.

    Args:
        module: the edited module.
        target: its target.
        spec: the positions of the edit.
        activation: the activation of the edit.
    """
    if spec.kind != "all" or spec.modality is not None:
        return (
            "it edits chosen positions, and a weight acts on all of them; positions='all' would "
            "merge"
        )
    if activation != "linear":
        return f"its activation {activation!r} is not linear"
    if not (type(module) is nn.Linear or _is_conv1d(module)):
        return (
            f"{target.path!r} is a {type(module).__name__}: its edit acts on the whole residual "
            "stream, or its weight is not a plain matrix; an edit of a linear layer's output "
            "would merge"
        )
    if target.side != "output":
        return f"it edits the input of {target.path!r}; an edit of its output would merge"
    return None


def affine(weights: EditWeights | RedWeights, width: int) -> tuple[Tensor, Tensor]:
    """The affine map of an edit with a linear activation, edit(h) = M h + v.

    Args:
        weights: the weights of one layer.
        width: d, the last dimension of the hidden state.

    Returns:
        M ``[d, d]`` and v ``[d]``, both fp64.
    """
    if isinstance(weights, RedWeights):
        return torch.diag(weights.scale.double()), weights.bias.double()
    B = weights.write.double()
    A = torch.zeros_like(B) if weights.read is None else weights.read.double()
    c = B.new_zeros(B.shape[0]) if weights.read_bias is None else weights.read_bias.double()
    if weights.subtract_projection:
        A = A - B
    if weights.subtract_bias is not None:
        c = c - weights.subtract_bias.double()
    return torch.eye(width, dtype=torch.float64, device=B.device) + B.mT @ A, B.mT @ c


@torch.no_grad()
def merge(module: nn.Module, weights: EditWeights | RedWeights, safe: bool) -> None:
    """Merge one edit into a linear layer, in place.

    Computed in fp64 and rounded once to the dtype of the layer's weight.

    Args:
        module: ``nn.Linear`` or transformers' ``Conv1D``; a missing bias is created.
        weights: the weights of the edit.
        safe: whether to check that the result is finite.

    Raises:
        ValueError: ``safe`` is true and a merged value is not finite.
    """
    old_weight, old_bias = module.weight, module.bias
    assert isinstance(old_weight, Tensor)
    M, v = affine(weights, old_weight.shape[1] if _is_conv1d(module) else old_weight.shape[0])
    M, v = M.to(old_weight.device), v.to(old_weight.device)
    weight = old_weight.double()
    weight = weight @ M.mT if _is_conv1d(module) else M @ weight
    bias = M @ old_bias.double() + v if isinstance(old_bias, Tensor) else v
    if safe and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(
            "safe_merge: the merged weights are not finite; the adapter seems to be broken"
        )
    old_weight.data = weight.to(old_weight.dtype)
    if isinstance(old_bias, Tensor):
        old_bias.data = bias.to(old_weight.dtype)
    else:
        module.bias = nn.Parameter(bias.to(old_weight.dtype), requires_grad=False)


Place = tuple[Target, Intervention, int]
"""A target, the stack with its weights, and its index in the stack."""


def check_mergeable(name: str, model: nn.Module, places: Iterable[Place], spec: Spec) -> None:
    """Check that an adapter merges exactly.

    Args:
        name: name of the adapter.
        model: the model.
        places: the places that the adapter edits.
        spec: the positions that it edits.

    Raises:
        ValueError: it does not, with the reason.
    """
    for target, stack, _ in places:
        reason = why_not(model.get_submodule(target.path), target, spec, stack.activation)
        if reason is not None:
            raise ValueError(f"merge_and_unload: adapter {name!r} does not merge exactly: {reason}")


def merge_adapter(model: nn.Module, places: Iterable[Place], safe: bool) -> None:
    """Merge an adapter into linear layers of the model; call :func:`check_mergeable` first."""
    for target, stack, index in places:
        with torch.no_grad():
            weights = stack.build()[index]
        merge(model.get_submodule(target.path), weights, safe)
