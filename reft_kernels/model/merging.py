"""Merging an edit into weights, where that is exact.

An edit of a linear layer's output, at all positions and with a linear activation, is affine: h -> M
h + v. With h = W0 x + b0 it merges exactly into weight M W0 and bias M b0 + v. Nothing else does:
an edit at chosen positions depends on the position, an edit of the residual stream acts on what
earlier layers wrote too, and an activation is not affine.
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
    """None when an edit merges exactly into ``module``, else the reason why not."""
    if spec.kind != "all":
        return (
            "it edits chosen positions, and a weight acts on all of them; positions='all' would "
            "merge"
        )
    if activation != "linear":
        return f"its activation {activation!r} is not linear"
    if not (type(module) is nn.Linear or _is_conv1d(module)):
        return (
            f"{target.path!r} is a {type(module).__name__}: its edit acts on the whole residual "
            "stream, or its weight is not a "
            "plain matrix; an edit of a linear layer's output would merge"
        )
    if target.side != "output":
        return f"it edits the input of {target.path!r}; an edit of its output would merge"
    return None


def affine(weights: EditWeights | RedWeights, width: int) -> tuple[Tensor, Tensor]:
    """M ``[d, d]`` and v ``[d]`` in fp64 with edit(h) = M h + v, for a linear activation."""
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
    """Fold one edit into a linear layer: computed in fp64, rounded once to the weight's dtype.

    Raises:
        ValueError: ``safe``, and the merged weight is not finite.
    """
    M, v = affine(weights, module.weight.shape[1] if _is_conv1d(module) else module.weight.shape[0])
    weight = module.weight.double()
    M, v = M.to(weight.device), v.to(weight.device)
    weight = weight @ M.mT if _is_conv1d(module) else M @ weight
    bias = v if module.bias is None else M @ module.bias.double() + v
    if safe and not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise ValueError(
            "safe_merge: the merged weights are not finite; the adapter seems to be broken"
        )
    dtype = module.weight.dtype
    module.weight.data = weight.to(dtype)
    if module.bias is None:
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    else:
        module.bias.data = bias.to(dtype)


Place = tuple[Target, Intervention, int]
"""A target with the stack and the index that hold its weights."""


def check_mergeable(name: str, model: nn.Module, places: Iterable[Place], spec: Spec) -> None:
    """Raise ValueError, with the reason, where an adapter does not merge exactly."""
    for target, stack, _ in places:
        reason = why_not(model.get_submodule(target.path), target, spec, stack.activation)
        if reason is not None:
            raise ValueError(f"merge_and_unload: adapter {name!r} does not merge exactly: {reason}")


def merge_adapter(model: nn.Module, places: Iterable[Place], safe: bool) -> None:
    """Merge an adapter that :func:`check_mergeable` accepts into the model's linear layers."""
    for target, stack, index in places:
        with torch.no_grad():
            weights = stack.build()[index]
        merge(model.get_submodule(target.path), weights, safe)
