"""The ReFT edits and RED as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.arguments import EditWeights, RedWeights, RowSelection
from reft_kernels.autograd import apply_red
from reft_kernels.checks import check_red
from reft_kernels.interventions.base import Intervention


class LoReFT(Intervention):
    """LoReFT: h + R^T (act(W h + b) - R h).

    R ``[r, d]`` has orthonormal rows; W is ``[r, d]`` and b ``[r]``.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equation 2.
    """

    subtract_projection = True

    def _why_no_identity(self) -> str | None:
        return (
            None
            if self.activation == "linear"
            else f"LoReFT with activation {self.activation!r} is never the identity"
        )

    def _make_identity(self) -> None:
        self.W.copy_(self.R)
        self.b.zero_()


class DiReFT(Intervention):
    """DiReFT with orthonormal R: h + R^T act(W h + b).

    This is LoReFT without the subtracted projection. For the paper's DiReFT see :class:`NodiReFT`.
    """

    def _why_no_identity(self) -> str | None:
        return self._dead_at_zero()

    def _make_identity(self) -> None:
        self.W.zero_()
        self.b.zero_()


class NodiReFT(Intervention):
    """NodiReFT, the paper's DiReFT: h + W2^T act(W1 h + b).

    W1 and W2 ``[r, d]`` are unconstrained; b is ``[r]``.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, equation 3.
    """

    orthonormal = False

    def _make_identity(self) -> None:
        self.W2.zero_()
        self.b.zero_()


class NoReFT(NodiReFT):
    """NoReFT: h + W2^T (act(W1 h + b) - W2 h), with unconstrained W1 and W2 ``[r, d]``."""

    subtract_projection = True


class ConsReFT(Intervention):
    """ConsReFT: h + R^T (act(s) - R h), with orthonormal R ``[r, d]`` and s ``[r]``.

    It does not support ``init="identity"``.
    """

    reads = False
    subtract_projection = True

    def _why_no_identity(self) -> str | None:
        return "ConsReFT replaces the projection R h by a constant, which no s leaves unchanged"


class LobiReFT(Intervention):
    """LobiReFT: h + R^T act(s), with orthonormal R ``[r, d]`` and s ``[r]``."""

    reads = False

    def _why_no_identity(self) -> str | None:
        return self._dead_at_zero()

    def _make_identity(self) -> None:
        self.s.zero_()


class RED(Intervention):
    """RED: scale * h + bias, with scale and bias ``[d]``.

    ``rank`` has no effect; ``activation`` and ``dropout`` must have their default values.

    Source: Wu et al., "Advancing Parameter Efficiency in Fine-tuning via Representation Editing",
    2024.
    """

    orthonormal = False
    reads = False

    def __init__(self, embed_dim: int, rank: int = 1, **kwargs: Any) -> None:
        super().__init__(embed_dim, rank, **kwargs)
        if self.activation != "linear" or self.dropout != 0.0:
            raise ValueError(
                f"activation, dropout: got {self.activation!r} and {self.dropout}, expected "
                "'linear' and 0.0: RED has neither"
            )

    def _make_parameters(self, **factory: Any) -> None:
        self.scale = nn.Parameter(torch.empty(*self._lead, self.embed_dim, **factory))
        self.bias = nn.Parameter(torch.empty(*self._lead, self.embed_dim, **factory))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.scale.fill_(1.0)
            self.bias.zero_()

    def _stacked_weights(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.bias

    def _weights_of_layer(self, fields: tuple) -> EditWeights | RedWeights:
        return RedWeights(*fields)

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
        """Edit hidden states with one layer's weights; ``coeff`` must be None."""
        assert isinstance(weights, RedWeights)
        if coeff is not None:
            raise ValueError("coeff: got a tensor, expected None: RED has no subspace")
        return apply_red(hidden, weights, RowSelection(rows, weight_ids), inplace)

    def _check(
        self,
        hidden: Tensor,
        weights: EditWeights | RedWeights,
        rows: Tensor | None,
        weight_ids: Tensor | None,
        coeff: Tensor | None,
    ) -> None:
        assert isinstance(weights, RedWeights)
        check_red(hidden, weights.scale, weights.bias, rows, weight_ids)
