"""Interventions for L layers with stacked parameters."""

from __future__ import annotations

from typing import Any

from reft_kernels.arguments import EditWeights, RedWeights
from reft_kernels.interventions.base import Intervention
from reft_kernels.interventions.members import (
    RED,
    ConsReFT,
    DiReFT,
    LobiReFT,
    LoReFT,
    NodiReFT,
    NoReFT,
)


class _Stacked(Intervention):
    """Base of the interventions for L layers.

    ``forward`` computes the weights of all layers, which are then passed to
    :meth:`Intervention.edit` layer by layer. It is the module's forward so that engines which
    gather sharded parameters around it (FSDP2, ZeRO-3) work.
    """

    def __init__(self, num_layers: int, embed_dim: int, rank: int, **kwargs: Any) -> None:
        super().__init__(embed_dim, rank, _num_layers=num_layers, **kwargs)

    # An unstacked intervention's forward edits hidden states, hence the different signature
    def forward(self) -> list[EditWeights] | list[RedWeights]:  # type: ignore[override]
        return self.build()


class StackedLoReFT(_Stacked, LoReFT):
    """L layers of :class:`LoReFT`, with X ``[L, d, r]``, W ``[L, r, d]`` and b ``[L, r]``."""


class StackedDiReFT(_Stacked, DiReFT):
    """L layers of :class:`DiReFT`, with X ``[L, d, r]``, W ``[L, r, d]`` and b ``[L, r]``."""


class StackedNodiReFT(_Stacked, NodiReFT):
    """L layers of :class:`NodiReFT`, with W2 and W1 ``[L, r, d]`` and b ``[L, r]``."""


class StackedNoReFT(_Stacked, NoReFT):
    """L layers of :class:`NoReFT`, with W2 and W1 ``[L, r, d]`` and b ``[L, r]``."""


class StackedConsReFT(_Stacked, ConsReFT):
    """L layers of :class:`ConsReFT`, with X ``[L, d, r]`` and s ``[L, r]``."""


class StackedLobiReFT(_Stacked, LobiReFT):
    """L layers of :class:`LobiReFT`, with X ``[L, d, r]`` and s ``[L, r]``."""


class StackedRED(_Stacked, RED):
    """L layers of :class:`RED`, with scale and bias ``[L, d]``."""


STACKED: dict[str, type[_Stacked]] = {
    "loreft": StackedLoReFT,
    "direft": StackedDiReFT,
    "nodireft": StackedNodiReFT,
    "noreft": StackedNoReFT,
    "consreft": StackedConsReFT,
    "lobireft": StackedLobiReFT,
    "red": StackedRED,
}
"""Stacked classes by the name of the intervention."""
