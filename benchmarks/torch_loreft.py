"""LoReFT in plain PyTorch, implemented directly from the paper (arXiv:2404.03592)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class TorchLoReFT(nn.Module):
    """LoReFT edit y = h + R^T (W h + b - R h), initialized to the identity.

    Initially W = R, the ``rotation`` ``[r, d]``, and b = 0. Do not use weight decay without
    ``use_trivialization`` (PyTorch's d x d base matrix): it would shrink the stored signs of R.
    """

    def __init__(self, rotation: Tensor, *, use_trivialization: bool = False) -> None:
        super().__init__()
        rank, width = rotation.shape
        linear, form = nn.Linear(width, rank, bias=False), "householder"
        self.rotate = orthogonal(linear, orthogonal_map=form, use_trivialization=use_trivialization)
        self.source = nn.Linear(width, rank)
        with torch.no_grad():
            self.rotate.weight = rotation
            # the parametrization's round trip costs an ulp
            self.source.weight.copy_(self.rotate.weight)
            self.source.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return edited rows ``[N, d]``."""
        R = self.rotate.weight
        return hidden + (self.source(hidden) - hidden @ R.T) @ R
