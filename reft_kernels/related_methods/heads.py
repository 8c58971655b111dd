"""Edits of attention heads, before the output projection: one RED launch, a weight set for each
head.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import functional
from reft_kernels.checks import check_row_values, describe, mark_rows

STAGES = ("tune", "select")
_INT32_MAX = 2**31 - 1


class HeadSelection(NamedTuple):
    """Which heads of which tokens an edit touches: rows of ``z.view(-1, head_dim)``, and each
    row's place among the heads.
    """

    rows: Tensor | None  # int32 [N * K]; None: every head of every token
    weight_ids: Tensor  # int32 [N * K], below K


class _HeadEdit(nn.Module, abc.ABC):
    """z -> scale * z + bias, elementwise, with one scale and bias ``[head_dim]`` for each edited
    head.
    """

    def __init__(self, num_heads: int, head_dim: int, heads: Sequence[int] | None) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        chosen = list(range(num_heads)) if heads is None else list(heads)
        good = all(
            isinstance(h, int) and not isinstance(h, bool) and 0 <= h < num_heads for h in chosen
        )
        if not chosen or not good or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"heads: got {heads!r}, expected different head numbers in [0, {num_heads})"
            )
        self.num_heads, self.head_dim, self.heads = num_heads, head_dim, tuple(sorted(chosen))

    @abc.abstractmethod
    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Scale and bias of the edited heads, each ``[K, head_dim]``."""

    def _check(self, z: Tensor) -> int:
        width = self.num_heads * self.head_dim
        if not isinstance(z, Tensor) or z.dim() < 1 or z.shape[-1] != width:
            raise ValueError(
                f"z: got {describe(z)}, expected a tensor [..., {self.num_heads} * {self.head_dim}]"
            )
        total = z.numel() // width
        if total * self.num_heads > _INT32_MAX:
            raise ValueError(
                f"z: got {total} tokens of {self.num_heads} heads, expected at most {_INT32_MAX} "
                "heads in all"
            )
        return total

    def select(self, z: Tensor, rows: Tensor | None = None) -> HeadSelection:
        """The selection for ``z [..., num_heads * head_dim]`` and tokens ``rows`` (int32 ``[N]``,
        -1 skips; None: all).

        Built once a batch, it serves every layer with the same heads.

        Raises:
            TypeError, ValueError: ``z`` of another width, or ``rows`` that are not distinct int32
                token numbers.
        """
        total, count = self._check(z), len(self.heads)
        if rows is not None:
            if not isinstance(rows, Tensor) or rows.dtype != torch.int32:
                raise TypeError(f"rows: got {describe(rows)}, expected an int32 tensor [N]")
            if rows.dim() != 1 or rows.device != z.device:
                raise ValueError(
                    f"rows: got {describe(rows)}, expected [N] on {z.device}, where z is"
                )
            check_row_values(rows, total)
        tokens = torch.arange(total, dtype=torch.int32, device=z.device) if rows is None else rows
        sets = torch.arange(count, dtype=torch.int32, device=z.device).repeat(tokens.shape[0])
        sets = mark_rows(sets, count)
        if rows is None and count == self.num_heads:
            return HeadSelection(None, sets)
        heads = torch.tensor(self.heads, dtype=torch.int32, device=z.device)
        tokens = tokens.unsqueeze(1)
        chosen = (
            torch.where(tokens < 0, -1, tokens * self.num_heads + heads).to(torch.int32).flatten()
        )
        return HeadSelection(mark_rows(chosen, total * self.num_heads), sets)

    def forward(
        self, z: Tensor, *, rows: Tensor | HeadSelection | None = None, inplace: bool = False
    ) -> Tensor:
        """The edited input of an attention output projection.

        Args:
            z: ``[..., num_heads * head_dim]``, heads side by side. rows: int32 ``[N]`` tokens, what
                :meth:`select` made of
                them, or None for all. inplace: edit ``z`` itself; heads and tokens that are not
                    chosen are not touched.

        Returns:
            ``z``'s shape and dtype.

        Raises:
            TypeError, ValueError: ``z`` of another width, or ``rows`` that are not distinct int32
                token numbers.
        """
        self._check(z)
        selection = rows if isinstance(rows, HeadSelection) else self.select(z, rows)
        scale, bias = self._scale_and_bias()
        by_head = z.unflatten(-1, (self.num_heads, self.head_dim))
        out = functional.red(
            by_head,
            scale,
            bias,
            rows=selection.rows,
            weight_ids=selection.weight_ids,
            inplace=inplace,
        )
        return z if inplace else out.flatten(-2)

    def extra_repr(self) -> str:
        edited = "all" if len(self.heads) == self.num_heads else list(self.heads)
        return f"{self.num_heads}, {self.head_dim}, heads={edited}"


class LoFiT(_HeadEdit):
    """LoFiT: z_i + v_i for chosen heads i ("tune"), or (1 + a_i) z_i to find which heads matter
    ("select").

    The paper trains ``a`` on all heads with an L1 penalty, takes the heads with the largest |a_i|
    (:meth:`scores`), and trains ``v`` on those alone. ``v`` and ``a`` are ``[K, head_dim]``, 0 at
    the start, so that the model is unchanged.

    Args:
        num_heads: of the attention.
        head_dim: of the attention.
        heads: the K heads to edit, in ascending order in the parameters; None: all.
        stage: "tune" or "select".
        dtype: of the parameters, fp32 when None.
        device: of the parameters.

    Raises:
        ValueError: an argument out of range.

    Source: Yin et al., "LoFiT: Localized Fine-tuning on LLM Representations", 2024,
    arXiv:2406.01563, section 3.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        heads: Sequence[int] | None = None,
        *,
        stage: str = "tune",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, heads)
        if stage not in STAGES:
            raise ValueError(f"stage: got {stage!r}, expected one of {', '.join(STAGES)}")
        self.stage = stage
        zeros = torch.zeros(
            len(self.heads),
            head_dim,
            dtype=torch.float32 if dtype is None else dtype,
            device=device,
        )
        self.v = nn.Parameter(zeros) if stage == "tune" else None
        self.a = nn.Parameter(zeros) if stage == "select" else None

    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        if self.stage == "tune":
            return torch.ones_like(self.v), self.v
        return 1 + self.a, torch.zeros_like(self.a)

    def scores(self) -> Tensor:
        """|a_i| of each head, ``[K]``, for stage "select".

        Raises:
            RuntimeError: the stage is "tune".
        """
        if self.a is None:
            raise RuntimeError(
                "scores: the stage is 'tune', expected 'select': only scales rank the heads"
            )
        return torch.linalg.vector_norm(self.a.detach(), dim=-1)


class JoLA(_HeadEdit):
    """JoLA: (1 + g_i a_i) z_i + k_i v_i for each head i, with hard concrete gates g_i and k_i in
    [0, 1].

        s = sigmoid((log u - log(1 - u) + alpha) / beta), u uniform     in training
        s = sigmoid(alpha)                                              in evaluation
        gate = clamp(s (high - low) + low, 0, 1)

    ``a``, ``v`` ``[K, head_dim]`` start at 0, so that the model is unchanged; ``alpha_a``,
    ``alpha_v`` ``[K]`` are the gates'
    logits. Variant: the formula and the defaults beta = 0.33, low = -0.1, high = 1.1 of the
    authors' code; their start of the logits is not taken over (0 here, half open).
    :meth:`expected_open` is the penalty on open gates.

    Args:
        num_heads: as :class:`LoFiT`.
        head_dim: as :class:`LoFiT`.
        heads: as :class:`LoFiT`.
        temperature: beta.
        stretch: (low, high).
        dtype: as :class:`LoFiT`.
        device: as :class:`LoFiT`.

    Raises:
        ValueError: an argument out of range.

    Source: Lai et al., "Joint Localization and Activation Editing for Low-Resource Fine-Tuning",
    2025, arXiv:2502.01179;
    gates: Louizos et al., "Learning Sparse Neural Networks through L0 Regularization", 2018,
    equations 10 to 13.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        heads: Sequence[int] | None = None,
        *,
        temperature: float = 0.33,
        stretch: tuple[float, float] = (-0.1, 1.1),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, heads)
        if not temperature > 0:
            raise ValueError(f"temperature: got {temperature!r}, expected a positive number")
        if len(stretch) != 2 or not stretch[0] < 0 or not stretch[1] > 1:
            raise ValueError(
                f"stretch: got {stretch!r}, expected (low, high) with low < 0 and high > 1"
            )
        self.temperature, self.stretch = float(temperature), (float(stretch[0]), float(stretch[1]))
        factory = {"dtype": torch.float32 if dtype is None else dtype, "device": device}
        count = len(self.heads)
        self.a = nn.Parameter(torch.zeros(count, head_dim, **factory))
        self.v = nn.Parameter(torch.zeros(count, head_dim, **factory))
        self.alpha_a = nn.Parameter(torch.zeros(count, **factory))
        self.alpha_v = nn.Parameter(torch.zeros(count, **factory))

    def gate(self, alpha: Tensor) -> Tensor:
        """The gates of logits ``alpha [K]``: drawn in training, fixed in evaluation."""
        s = alpha
        if self.training:
            u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
            s = (torch.logit(u) + alpha) / self.temperature
        low, high = self.stretch
        return (torch.sigmoid(s) * (high - low) + low).clamp(0, 1)

    def expected_open(self) -> Tensor:
        """Expected number of gates that are not 0: sum sigmoid(alpha - beta log(-low / high)), a
        differentiable scalar.
        """
        low, high = self.stretch
        shift = self.temperature * math.log(-low / high)
        return sum(torch.sigmoid(alpha - shift).sum() for alpha in (self.alpha_a, self.alpha_v))

    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        scale = 1 + self.gate(self.alpha_a).unsqueeze(1) * self.a
        return scale, self.gate(self.alpha_v).unsqueeze(1) * self.v
