"""Folding an edit into what a serving engine precomputes, and merging it into a linear layer
where that is exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import positions as positions_module
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.interventions import RED, EditWeights, Intervention, RedWeights
from reft_kernels.model import merging
from reft_kernels.model.components import Target


class Folded(NamedTuple):
    """An edit as h + write^T (read h + read_bias); no subtraction is left, and nothing needs a
    gradient.
    """

    read: Tensor | None  # A = W - R, [r, d]; None where A = 0 (LobiReFT)
    read_bias: Tensor  # b, [r]
    write: Tensor  # R, [r, d]


def _fold(weights: EditWeights) -> Folded:
    write = weights.write.to(accumulation_dtype(weights.write.dtype))
    read = None if weights.read is None else weights.read.to(write.dtype)
    if weights.subtract_projection:
        read = -write if read is None else read - write
    bias = (
        write.new_zeros(write.shape[:-1])
        if weights.read_bias is None
        else weights.read_bias.to(write.dtype)
    )
    if weights.subtract_bias is not None:
        bias = bias - weights.subtract_bias.to(write.dtype)
    # copies, because a later optimizer step changes the parameters in place
    return Folded(
        None if read is None else read.detach().clone(),
        bias.detach().clone(),
        write.detach().clone(),
    )


@torch.no_grad()
def fold(intervention: Intervention) -> Folded | list[Folded]:
    """The edit of evaluation as h + R^T (A h + b): one matrix to read with, one bias, one matrix to
    write with.

        LoReFT, NoReFT     A = W - R, A = W1 - W2          ConsReFT     A = -R, b = s
        DiReFT, NodiReFT   A = W, A = W1                   LobiReFT     A = None (0), b = s

    Args:
        intervention: a member of the family with a linear activation.

    Returns:
        read ``[r, d]`` (None for LobiReFT), read_bias ``[r]``, write ``[r, d]``, with a leading S
        where the intervention has ``num_sets``; fp32 (fp64 for fp64 parameters), copies. For a
        stacked intervention a list, one for each layer. ``nodireft(h, write, read, read_bias)``
        computes the edit, ``lobireft(h, write, read_bias)`` where read is None.

    Raises:
        TypeError: not an intervention, or RED, which is elementwise and has no such form.
        ValueError: an activation that is not linear: act(A h + b) does not fold.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equation 2 with
    W h - R h = (W - R) h.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(
            f"intervention: got {type(intervention).__name__}, expected one of the family, such "
            "as LoReFT"
        )
    if isinstance(intervention, RED):
        raise TypeError(
            "intervention: got RED, expected a low-rank edit: RED is elementwise, its scale and "
            "bias are all it has"
        )
    if intervention.activation != "linear":
        raise ValueError(
            f"intervention: got activation {intervention.activation!r}, expected 'linear': only "
            "that folds"
        )
    folded = [_fold(weights) for weights in intervention.build()]
    return folded[0] if intervention.num_layers is None else folded


class Merged:
    """A merge that can be undone: it holds a copy of the weight and bias from before."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._weight: Tensor | None = module.weight.detach().clone()
        self._bias: Tensor | None = None if module.bias is None else module.bias.detach().clone()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the saved weight and bias back, bit for bit, on the device where the module is now.

        Several merges into one module are undone in reverse order, since each holds what it found.

        Raises:
            RuntimeError: it was undone before.
        """
        if self._weight is None:
            raise RuntimeError("unmerge: the saved copy was put back before")
        device = self.module.weight.device
        self.module.weight.data = self._weight.to(device)
        if self._bias is None:
            self.module.bias = None
        else:
            self.module.bias.data = self._bias.to(device)
        self._weight = self._bias = None


def _layer_weights(intervention: Intervention, layer: int | None) -> EditWeights | RedWeights:
    layers = intervention.num_layers
    if layers is None and layer is not None:
        raise ValueError(f"layer: got {layer!r}, expected None: the intervention is not stacked")
    if layers is not None and (
        isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers
    ):
        raise ValueError(
            f"layer: got {layer!r}, expected a layer number in [0, {layers}): the intervention is "
            "stacked"
        )
    return intervention.build()[layer or 0]


@torch.no_grad()
def merge_linear(
    module: nn.Linear,
    intervention: Intervention,
    layer: int | None = None,
    *,
    positions: str = "all",
) -> Merged:
    """Merge the edit of a linear layer's output, at all positions, into its weight and bias: exact
    up to rounding.

    With edit(h) = M h + v and h = W0 x + b0: weight M W0, bias M b0 + v, computed in fp64 and
    rounded once. LobiReFT has M = I, so its weight stays as it is bit for bit; and since it adds a
    constant, LobiReFT on the output of a block that adds a linear layer's output to the residual
    stream merges too: into that linear layer. A module that shares its parameters with another
    (tied weights) changes both.

    Args:
        module: an ``nn.Linear`` (or GPT-2's Conv1D), changed in place; a missing bias is added.
        intervention: of d = out_features, linear, without ``num_sets``. layer: of a stacked
        intervention.
        positions: where the edit acts; only "all" merges.

    Returns:
        The record of the merge; ``.unmerge()`` restores weight and bias bit for bit.

    Raises:
        TypeError: not an intervention. ValueError: an edit that does not merge exactly, with the
            reason, before anything
        changes: chosen positions, an activation, weight sets, another width, or a module that is
            not a plain linear layer.
    """
    if not isinstance(intervention, Intervention):
        raise TypeError(
            f"intervention: got {type(intervention).__name__}, expected one of the family, such "
            "as LoReFT"
        )
    target = Target(layer or 0, "module", "output", intervention.embed_dim, False)
    reason = merging.why_not(
        module, target, positions_module.parse(positions), intervention.activation
    )
    if reason is None and intervention.num_sets is not None:
        reason = (
            "its weight set is chosen for each row (num_sets), and a weight is the same for all"
        )
    if reason is not None:
        raise ValueError(f"merge_linear: the edit does not merge exactly: {reason}")
    width = getattr(module, "nf", None) or module.out_features
    if width != intervention.embed_dim:
        raise ValueError(
            f"intervention: got embed_dim {intervention.embed_dim}, expected {width}, the outputs "
            "of module"
        )
    weights = _layer_weights(intervention, layer)
    merged = Merged(module)
    merging.merge(module, weights, safe=True)
    return merged
