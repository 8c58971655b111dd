"""The weights of several adapters as weight sets of one edit.

Adapters whose edits have the same formula and activation are applied in one launch for each layer:
their matrices ``[r, d]`` become sets of one tensor ``[S, R, d]``, where R is the largest rank, and
``weight_ids`` names the set of each row. Matrices and biases are padded with zeros behind their own
r rows. A padded row of B adds 0 to the hidden state whatever the activation of its z is, and the
padding's gradients are dropped, so that each adapter computes what it computes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reft_kernels.arguments import BuiltWeights, EditWeights, RedWeights, RowSelection
from reft_kernels.autograd import apply_edit, apply_red
from reft_kernels.interventions.base import Intervention, with_rounded
from reft_kernels.operator_checks import as_built

LayerWeights = Sequence[EditWeights] | Sequence[RedWeights]


def formula_of(stack: Intervention, weights: EditWeights | RedWeights) -> tuple:
    """What two adapters must have in common to be weight sets of one edit.

    The kind of edit, the tensors that it has with their dtypes and devices, whether a projection is
    subtracted, and the activation. The methods may differ: LoReFT, DiReFT and NodiReFT with a
    linear activation are one formula.
    """
    kind = "red" if isinstance(weights, RedWeights) else "edit"
    fields = tuple((t.dtype, t.device) if isinstance(t, Tensor) else t for t in weights)
    return kind, stack.embed_dim, stack.activation, fields


def _padded(tensor: Tensor, rank: int, rank_dim: int) -> Tensor:
    """``tensor`` with zeros appended along ``rank_dim``, up to ``rank``."""
    missing = rank - tensor.shape[rank_dim]
    if not missing:
        return tensor
    behind = (0, 0) * (tensor.dim() - 1 - rank_dim)
    return torch.nn.functional.pad(tensor, (*behind, 0, missing))


def stack_sets(adapters: Sequence[LayerWeights]) -> list[EditWeights] | list[RedWeights]:
    """The weights of several adapters as weight sets, for each layer.

    Args:
        adapters: for each adapter, the weights of the same number L of layers, with or without
            weight sets of their own; all of one :func:`formula_of`.

    Returns:
        L entries whose tensors have a leading dimension S, the number of all sets, in the order of
        ``adapters``. Differentiable with respect to the adapters' weights.
    """
    first: Any = adapters[0][0]
    red = isinstance(first, RedWeights)
    # scale [d] or [S, d]; write [r, d] or [S, r, d]
    written = [w.scale if isinstance(w, RedWeights) else w.write for w, *_ in adapters]
    has_sets = [tensor.dim() > (1 if red else 2) for tensor in written]
    rank = 0 if red else max(tensor.shape[-2] for tensor in written)
    fields: list[Any] = []
    for number, like in enumerate(first):
        if not isinstance(like, Tensor):
            fields.append(like)
            continue
        members = []
        for layers, sets in zip(adapters, has_sets, strict=True):
            column: Any = [layer[number] for layer in layers]
            stacked = torch.stack(column)
            stacked = stacked if sets else stacked.unsqueeze(1)
            members.append(stacked if red else _padded(stacked, rank, 2))
        fields.append(torch.cat(members, dim=1))
    count = len(adapters[0])
    # the backward of unbind is a single stack for all layers
    columns = [t.unbind(0) if isinstance(t, Tensor) else (t,) * count for t in fields]
    if red:
        return [RedWeights(*layer) for layer in zip(*columns, strict=True)]
    layers = [EditWeights(*layer) for layer in zip(*columns, strict=True)]
    if torch.compiler.is_compiling() or not isinstance(as_built(layers[0]), BuiltWeights):
        return layers
    return with_rounded([BuiltWeights(*layer) for layer in layers], fields[0], fields[2])


class Bank:
    """The padded weights of several adapters at the same layers, and their edit.

    Args:
        stacks: the stacked intervention of each adapter; all of one :func:`formula_of`.
        indices: for each adapter, its layers' indices in its stack, one for each layer of the bank.
    """

    def __init__(self, stacks: Sequence[Intervention], indices: Sequence[Sequence[int]]) -> None:
        self.stacks = tuple(stacks)
        self.indices = tuple(map(tuple, indices))
        self.activation = stacks[0].activation
        counts = [stack.num_sets or 1 for stack in stacks]
        self.first_sets = [sum(counts[:number]) for number in range(len(counts))]
        self.num_sets = sum(counts)
        self._counts = counts
        self._probabilities: dict[tuple, Tensor] = {}  # of keeping, for each weight set

    def build(
        self, weights_of: Callable[[Intervention], LayerWeights]
    ) -> list[EditWeights] | list[RedWeights]:
        """The bank's weights at each of its layers.

        Args:
            weights_of: returns the weights of all layers of a stack.
        """
        adapters: Any = [
            [weights[index] for index in indices]
            for weights, indices in zip(map(weights_of, self.stacks), self.indices, strict=True)
        ]
        return stack_sets(adapters)

    def __call__(self) -> list[EditWeights] | list[RedWeights]:
        """Build the weights of all adapters, and of these the bank's."""
        return self.build(lambda stack: stack())

    def _dropout_coeff(self, weight_ids: Tensor, rank: int, coeff: Tensor | None) -> Tensor | None:
        """``coeff`` times a dropout mask ``[N, R]`` with the probability of each row's adapter."""
        keep = [1.0 - stack.dropout if stack.training else 1.0 for stack in self.stacks]
        if all(k == 1.0 for k in keep):
            return coeff
        key = (*keep, weight_ids.device)
        if key not in self._probabilities:  # a copy to the device, so once for all layers
            by_set = [k for k, count in zip(keep, self._counts, strict=True) for _ in range(count)]
            self._probabilities[key] = torch.tensor(by_set, device=weight_ids.device)
        chosen = self._probabilities[key][weight_ids.long()].unsqueeze(1)
        mask = torch.bernoulli(chosen.expand(-1, rank)) / chosen
        return mask if coeff is None else mask * coeff

    def edit(
        self,
        hidden: Tensor,
        weights: EditWeights | RedWeights,
        *,
        rows: Tensor | None = None,
        weight_ids: Tensor | None = None,
        coeff: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Edit hidden states; see :meth:`Intervention.edit`. ``weight_ids`` is required."""
        assert weight_ids is not None
        if isinstance(weights, RedWeights):
            assert coeff is None
            return apply_red(hidden, weights, RowSelection(rows, weight_ids), inplace)
        coeff = self._dropout_coeff(weight_ids, weights.write.shape[-2], coeff)
        selection = RowSelection(rows, weight_ids, coeff)
        return apply_edit(hidden, weights, selection, self.activation, inplace)
