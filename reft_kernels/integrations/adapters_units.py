"""The units (weights of one edit) of AdapterHub's ``adapters`` as stacked interventions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from adapters.configuration import ReftConfig
from adapters.methods.reft import ReftLayer, ReftModule
from torch import Tensor, nn

from reft_kernels.activations import canonical_activation
from reft_kernels.arguments import RowSelection
from reft_kernels.autograd import apply_red
from reft_kernels.checks import mark_rows
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.integrations.torch_orthogonal import householder_chain, original_of, rotations
from reft_kernels.interventions import EditWeights, Intervention, RedWeights
from reft_kernels.parametrization import MAX_RANK
from reft_kernels.positions import Spec


class UnitSettings(NamedTuple):
    """The settings that layers must share for their weights to be stacked."""

    spec: Spec
    tied: bool
    width: int
    rank: int
    orthogonal: bool
    subtract_projection: bool
    activation: str


def unit_settings(layer: ReftLayer, name: str) -> UnitSettings:
    """Return the settings of adapter ``name`` in a layer; raise ValueError if unsupported."""
    module = layer.refts[name]
    unit = module.units[0]
    rank, width = unit.learned_source.weight.shape
    config = layer.adapters_config.match(
        name, ReftConfig, layer_idx=layer.layer_idx, location_key=layer.location_key
    )
    if rank > min(width, MAX_RANK):
        raise ValueError(f"r: adapter {name!r} has {rank}, expected at most {min(width, MAX_RANK)}")
    try:
        activation = canonical_activation(config.non_linearity)
    except ValueError as error:
        raise ValueError(f"non_linearity: adapter {name!r}: {error}") from None
    spec = Spec("ends", module.prefix_positions, module.suffix_positions)
    return UnitSettings(
        spec,
        module.tied_weights,
        width,
        rank,
        unit.orthogonal,
        unit.subtract_projection,
        activation,
    )


def _signs(X: Tensor) -> Tensor:
    """Return the signs ``[..., r]`` of the columns of H(X).

    PyTorch stores them on the diagonal of X and truncates them to integers, which gives 0 after
    weight decay. Here they are rounded to +1 or -1 instead.
    """
    return torch.where(X.detach().diagonal(dim1=-2, dim2=-1) > 0, 1.0, -1.0).to(X.dtype)


@torch.no_grad()
def restore_signs(layer: ReftLayer) -> None:
    """Restore the signs on the diagonal of X to +1 and -1 after weight decay.

    ``adapters`` then evaluates the same R that was trained.
    """
    for module in layer.refts.values():
        for chain in filter(None, (householder_chain(unit.projection) for unit in module.units)):
            X = original_of(chain)
            X.diagonal().copy_(_signs(X))


class StackedUnits(Intervention):
    """The units of ``adapters`` with the same settings in one backbone, as a stacked intervention.

    It has no parameters of its own.
    """

    def __init__(self, settings: UnitSettings, modules: list[ReftModule]) -> None:
        self.orthonormal, self.subtract_projection = (
            settings.orthogonal,
            settings.subtract_projection,
        )
        super().__init__(
            settings.width,
            settings.rank,
            activation=settings.activation,
            init="orthogonal",
            num_sets=None if settings.tied else 2,
            _num_layers=len(modules),
        )
        self.spec = settings.spec
        # A list and not a ModuleList, because the units are already submodules of the model
        self.units = [unit for module in modules for unit in module.units]

    def _make_parameters(self, **factory: Any) -> None:
        """Do nothing, since the units have the parameters."""

    def reset_parameters(self) -> None:
        """Do nothing, since ``adapters`` initializes the parameters."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return (parameter for unit in self.units for parameter in unit.parameters())

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return (buffer for unit in self.units for buffer in unit.buffers())

    # As in other stacked interventions, forward computes the weights
    def forward(self) -> list[EditWeights] | list[RedWeights]:  # type: ignore[override]
        """Return the weights of each layer."""
        return self.build()

    def _stack(self, tensors: list[Tensor]) -> Tensor:
        stacked = torch.stack([t.to(accumulation_dtype(t.dtype)) for t in tensors])
        return stacked.view(*self._lead, *stacked.shape[1:])

    def _write(self) -> Tensor:
        chains = [
            chain
            for unit in self.units
            if (chain := householder_chain(unit.projection)) is not None
        ]
        if len(chains) < len(self.units):
            return self._stack([unit.projection.weight for unit in self.units])
        X = torch.stack([original_of(chain).mT for chain in chains]).contiguous()
        return self._stack(rotations(chains, X, _signs(X)))

    def _stacked_weights(self) -> tuple[Tensor, Tensor, Tensor, None, bool]:
        source = [unit.learned_source for unit in self.units]
        # In half precision R would not be orthonormal
        with torch.autocast(source[0].weight.device.type, enabled=False):
            read, bias, write = (
                self._stack([s.weight for s in source]),
                self._stack([s.bias for s in source]),
                self._write(),
            )
            if self.orthonormal and self.subtract_projection and self.activation == "linear":
                return read - write, bias, write, None, False
        return read, bias, write, None, self.subtract_projection

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
        """Apply the edit and then the dropout of ``adapters`` to the edited rows.

        The random numbers are drawn in the order of ``adapters``.
        """
        edited = super().edit(
            hidden, weights, rows=rows, weight_ids=weight_ids, coeff=coeff, inplace=inplace
        )
        dropout = self.units[0].dropout
        if not dropout.training or dropout.p == 0.0:
            return edited
        per_example = self.spec.per_example
        assert rows is not None and per_example is not None  # the positions are first and last
        count = rows.shape[0]
        parts = [count]
        if self.num_sets is not None and count % per_example == 0:
            parts = [self.spec.first, self.spec.last]
        ones = torch.ones(count // sum(parts), max(parts), self.embed_dim, device=hidden.device)
        mask = torch.cat([dropout(ones[:, :part]) for part in parts], dim=1).view(
            count, self.embed_dim
        )
        # RED with the mask as scale and one weight set per row
        set_of_row = mark_rows(torch.arange(count, device=hidden.device, dtype=torch.int32), count)
        selection = RowSelection(rows, set_of_row)
        return apply_red(edited, RedWeights(mask, torch.zeros_like(mask)), selection, inplace)
