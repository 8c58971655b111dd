"""Evaluation of ``torch.nn.utils.parametrizations.orthogonal`` for all layers at once.

pyreft and adapters parametrize R in this way. For a matrix that is not square it is
R^T = base H(X) diag(signs), where H(X) is a product of Householder reflectors.
:func:`reft_kernels.householder` computes H(X) for all layers in one call; each layer then needs one
product with its d x d base.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _OrthMaps, _Orthogonal
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from reft_kernels.parametrization import MAX_RANK, householder


def householder_chain(layer: nn.Module) -> ParametrizationList | None:
    """Return the parametrization of a layer's weight if it is PyTorch's Householder map.

    Returns:
        The parametrization, or None if the weight has no parametrization or another one (PyTorch
        uses the matrix exponential for a square R), or if r exceeds the supported rank.
    """
    if not is_parametrized(layer, "weight"):
        return None
    assert isinstance(layer.parametrizations, nn.ModuleDict)
    chain = layer.parametrizations["weight"]
    assert isinstance(chain, ParametrizationList)
    if len(chain) != 1:
        return None
    if type(chain[0]) is not _Orthogonal or chain[0].orthogonal_map != _OrthMaps.householder:
        return None
    return chain if min(original_of(chain).shape) <= MAX_RANK else None


def original_of(chain: ParametrizationList) -> Tensor:
    """Return the unconstrained parameter of a parametrization with a single original."""
    assert isinstance(chain.original, Tensor)
    return chain.original


def rotations(chains: Sequence[ParametrizationList], X: Tensor, signs: Tensor) -> list[Tensor]:
    """Compute R of several parametrizations.

    Args:
        chains: L results of :func:`householder_chain` with the same shape.
        X: ``[L, d, r]``, their stacked original parameters.
        signs: ``[L, r]`` of +1 and -1 (or 0).

    Returns:
        L tensors R ``[r, d]`` in fp32 (fp64 for fp64 ``X``), differentiable with respect to ``X``.
    """
    # In half precision R would not be orthonormal
    with torch.autocast(X.device.type, enabled=False):
        H = householder(X, signs=signs.to(torch.promote_types(X.dtype, torch.float32)))
        bases = [getattr(chain[0], "base", None) for chain in chains]
        return [
            h if base is None else h @ base.to(h.dtype).mT
            for h, base in zip(H.unbind(0), bases, strict=True)
        ]
