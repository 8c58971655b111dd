"""Folding of an edit into two matrices and a bias, and merging of an edit into a linear layer."""

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
    """An edit in the form h + write^T (read h + read_bias)."""

    read: Tensor | None  # [r, d], W - R for LoReFT; None if it is zero (LobiReFT)
    read_bias: Tensor  # [r]
    write: Tensor  # [r, d]


def _fold(weights: EditWeights | RedWeights) -> Folded:
    assert isinstance(weights, EditWeights)
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
    # Copies, because a later optimizer step changes the parameters in place
    return Folded(
        None if read is None else read.detach().clone(),
        bias.detach().clone(),
        write.detach().clone(),
    )


@torch.no_grad()
def fold(intervention: Intervention) -> Folded | list[Folded]:
    """Write an edit with linear activation as h + R^T (A h + b).

    The result contains no subtraction and can be applied with ``nodireft(h, write, read,
    read_bias)``, or with ``lobireft(h, write, read_bias)`` if ``read`` is None. Dropout is not part
    of it.

        Intervention   read A     read_bias b   write
        LoReFT         W - R      b             R
        DiReFT         W          b             R
        NoReFT         W1 - W2    b             W2
        NodiReFT       W1         b             W2
        ConsReFT       -R         s             R
        LobiReFT       None (0)   s             R

    Args:
        intervention: Any intervention except RED, with linear activation.

    Returns:
        Copies of ``read [r, d]``, ``read_bias [r]`` and ``write [r, d]`` in fp32 (fp64 for fp64
        parameters), with a leading dimension S if the intervention has ``num_sets``. For a stacked
        intervention, a list with one entry per layer.

    Raises:
        TypeError: If ``intervention`` is not an intervention or is RED, which is elementwise.
        ValueError: If its activation is not linear.

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
    """Record of a merge, with copies of the module's original weight and bias.

    Args:
        module: The linear module, before the merge.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self._weight: Tensor | None = module.weight.detach().clone()
        # A Conv1D always has a bias; nn.Linear declares it as a Tensor, although it may be None
        bias: Tensor | None = module.bias
        self._bias: Tensor | None = None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original weight and bias bit for bit, on the module's current device.

        Undo several merges into one module in reverse order.

        Raises:
            RuntimeError: If this merge has been undone before.
        """
        if self._weight is None:
            raise RuntimeError("unmerge: the saved copy was put back before")
        device = self.module.weight.device
        self.module.weight.data = self._weight.to(device)
        if self._bias is None:
            self.module.register_parameter("bias", None)
        else:
            self.module.bias.data = self._bias.to(device)
        self._weight = self._bias = None


def _layer_weights(intervention: Intervention, layer: int | None) -> EditWeights | RedWeights:
    """Return one layer's weights; raise ValueError if ``layer`` does not fit the intervention."""
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
    """Merge the edit of a linear layer's output into its weight and bias.

    The edit is affine: edit(h) = M h + v. With h = W0 x + b0, the merged weight is M W0 and the
    merged bias M b0 + v, computed in fp64 and rounded once. For LobiReFT, M = I and the weight does
    not change. LobiReFT on the output of a transformer block can be merged into the linear layer
    whose output the block adds to the residual stream, because it adds a constant. If ``module``
    shares its parameters with another module, both change.

    Args:
        module: An ``nn.Linear`` or GPT-2's ``Conv1D``, changed in place. A missing bias is added.
        intervention: An intervention with embed_dim = out_features, linear activation and no
            ``num_sets``.
        layer: Layer number for a stacked intervention, else None.
        positions: The positions that are edited; only "all" can be merged.

    Returns:
        A record whose ``unmerge()`` restores the weight and the bias.

    Raises:
        TypeError: If ``intervention`` is not an intervention.
        ValueError: If the edit cannot be merged exactly: because of its positions, activation,
            weight sets or width, or because ``module`` is not a plain linear layer. The module is
            then unchanged.
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
