"""R of ``torch.nn.utils.parametrizations.orthogonal``, which pyreft and adapters use, by the
engine's stacked build.

For a matrix that is not square the parametrization is R^T = base H(X) diag(signs), H the product of
Householder reflectors that :func:`reft_kernels.householder` builds for all layers in one call, so
that one product with the d x d base remains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _OrthMaps, _Orthogonal
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from reft_kernels.parametrization import MAX_RANK, householder


def householder_chain(layer: nn.Module) -> ParametrizationList | None:
    """The parametrization of a layer's weight where it is torch's Householder map; None for
    another (a square R) or none.
    """
    if not is_parametrized(layer, "weight") or len(layer.parametrizations.weight) != 1:
        return None
    chain = layer.parametrizations.weight
    if type(chain[0]) is not _Orthogonal or chain[0].orthogonal_map != _OrthMaps.householder:
        return None
    return chain if min(chain.original.shape) <= MAX_RANK else None


def rotations(chains: Sequence[ParametrizationList], X: Tensor, signs: Tensor) -> list[Tensor]:
    """R ``[r, d]`` of each chain in fp32 (fp64 for fp64), differentiable with respect to X ``[L,
    d, r]``; signs ``[L, r]``.
    """
    with torch.autocast(
        X.device.type, enabled=False
    ):  # R in half precision would not be orthonormal
        H = householder(X, signs=signs.to(torch.promote_types(X.dtype, torch.float32)))
        bases = [getattr(chain[0], "base", None) for chain in chains]
        return [
            h if base is None else h @ base.to(h.dtype).mT
            for h, base in zip(H.unbind(0), bases, strict=True)
        ]
