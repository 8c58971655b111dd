"""LoReFT in plain PyTorch, implemented directly from the paper (arXiv:2404.03592)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from reft_kernels.positions import resolve


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


def add_hooks(model: nn.Module, layers: list[int], rotations: Tensor, positions: str) -> None:
    """Edit the outputs of ``model.encoder``'s layers by forward hooks.

    The edits are stored as ``model.edits``.
    """
    lists = [module for module in model.encoder.modules() if isinstance(module, nn.ModuleList)]
    blocks = next(blocks for blocks in lists if len(blocks) == model.config.num_hidden_layers)
    model.edits = nn.ModuleList(TorchLoReFT(rotation) for rotation in rotations)
    rows: list[Tensor] = []

    def find_rows(module: nn.Module, args: Any, inputs: dict[str, Tensor]) -> None:
        mask = inputs["attention_mask"]
        indices = resolve(positions, mask.sum(1), mask.shape[1], attention_mask=mask)
        rows[:] = [indices[indices >= 0].long()]

    def hook(edit: TorchLoReFT) -> Any:
        def edit_output(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            flat = hidden.reshape(-1, hidden.shape[-1])
            edited = flat.index_copy(0, rows[0], edit(flat[rows[0]])).view_as(hidden)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return edit_output

    model.register_forward_pre_hook(find_rows, with_kwargs=True)
    for layer, edit in zip(layers, model.edits, strict=True):
        blocks[layer].register_forward_hook(hook(edit))
