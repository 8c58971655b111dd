"""Edits of attention heads before the output projection.

Each edit is one RED operation with a weight set per head.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import functional
from reft_kernels.checks import check_row_values, describe, mark_rows

STAGES = ("tune", "select")
_INT32_MAX = 2**31 - 1


class HeadSelection(NamedTuple):
    """The heads and tokens to edit, as rows of ``z.view(-1, head_dim)``."""

    rows: Tensor | None  # int32 [N * K]; None for all heads of all tokens
    weight_ids: Tensor  # int32 [N * K], the weight set of each row, below K


class _HeadEdit(nn.Module, abc.ABC):
    """Base class of edits scale * z + bias with a scale and bias ``[head_dim]`` per edited head."""

    def __init__(self, num_heads: int, head_dim: int, heads: Sequence[int] | None) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("head_dim", head_dim)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        selected = list(range(num_heads)) if heads is None else list(heads)
        valid = all(
            isinstance(h, int) and not isinstance(h, bool) and 0 <= h < num_heads for h in selected
        )
        if not selected or not valid or len(set(selected)) < len(selected):
            raise ValueError(
                f"heads: got {heads!r}, expected different head numbers in [0, {num_heads})"
            )
        self.num_heads, self.head_dim, self.heads = num_heads, head_dim, tuple(sorted(selected))

    @abc.abstractmethod
    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        """Return scale and bias of the edited heads, each ``[K, head_dim]``."""

    def _check(self, z: Tensor) -> int:
        """Return the number of tokens of ``z``; raise ValueError if its shape is wrong."""
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
        """Return the rows to edit; the result can be reused for all layers with the same heads.

        Args:
            z: ``[..., num_heads * head_dim]``.
            rows: int32 ``[N]``, distinct token numbers; -1 skips an entry. None selects all tokens.

        Raises:
            TypeError: If ``rows`` is not an int32 tensor.
            ValueError: If ``z`` or ``rows`` has the wrong shape, device or values.
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
        selected = (
            torch.where(tokens < 0, -1, tokens * self.num_heads + heads).to(torch.int32).flatten()
        )
        return HeadSelection(mark_rows(selected, total * self.num_heads), sets)

    def forward(
        self, z: Tensor, *, rows: Tensor | HeadSelection | None = None, inplace: bool = False
    ) -> Tensor:
        """Edit the input of an attention output projection.

        Args:
            z: ``[..., num_heads * head_dim]``, the concatenated heads.
            rows: int32 ``[N]`` token numbers, a result of :meth:`select`, or None for all tokens.
            inplace: Edit ``z`` itself. Heads and tokens that are not selected are not accessed.

        Returns:
            The edited tensor, with the shape and dtype of ``z``.

        Raises:
            TypeError: If ``rows`` is not an int32 tensor.
            ValueError: If ``z`` or ``rows`` has the wrong shape, device or values.
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
    """LoFiT: (1 + a_i) z_i to rank heads (stage "select"), or z_i + v_i (stage "tune").

    The paper first trains ``a`` on all heads with an L1 penalty, selects the heads with the largest
    |a_i| (:meth:`scores`), and then trains ``v`` on these heads. ``a`` and ``v`` are
    ``[K, head_dim]`` and are initialized to 0, so that the edit initially changes nothing.

    Args:
        num_heads: Number of attention heads.
        head_dim: Dimension of a head.
        heads: The K heads to edit, or None for all. The parameters are in ascending order of heads.
        stage: "tune" or "select".
        dtype: dtype of the parameters; None means fp32.
        device: Device of the parameters.

    Raises:
        ValueError: If an argument is out of range.

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
        if self.v is not None:
            return torch.ones_like(self.v), self.v
        assert self.a is not None
        return 1 + self.a, torch.zeros_like(self.a)

    def scores(self) -> Tensor:
        """Return |a_i| of each head, ``[K]``, for stage "select".

        Raises:
            RuntimeError: If the stage is "tune".
        """
        if self.a is None:
            raise RuntimeError(
                "scores: the stage is 'tune', expected 'select': only scales rank the heads"
            )
        return torch.linalg.vector_norm(self.a.detach(), dim=-1)


class JoLA(_HeadEdit):
    """JoLA: (1 + g_i a_i) z_i + k_i v_i for each head i, with gates g_i and k_i in [0, 1].

    The gates follow the hard concrete distribution with logits alpha:

        s = sigmoid((log u - log(1 - u) + alpha) / beta), u uniform on (0, 1)   in training
        s = sigmoid(alpha)                                                      in evaluation
        gate = clamp(s (high - low) + low, 0, 1)

    ``a`` and ``v`` are ``[K, head_dim]`` and are initialized to 0, so that the edit initially
    changes nothing. ``alpha_a`` and ``alpha_v`` are the logits ``[K]`` of g and k. The formula and
    the defaults beta = 0.33, low = -0.1 and high = 1.1 are those of the authors' code, except that
    the logits are initialized to 0. :meth:`expected_open` is the penalty on open gates.

    Args:
        num_heads: Number of attention heads.
        head_dim: Dimension of a head.
        heads: The K heads to edit, or None for all. The parameters are in ascending order of heads.
        temperature: beta.
        stretch: (low, high), with low < 0 and high > 1.
        dtype: dtype of the parameters; None means fp32.
        device: Device of the parameters.

    Raises:
        ValueError: If an argument is out of range.

    Source: Lai et al., "Joint Localization and Activation Editing for Low-Resource Fine-Tuning",
    2025, arXiv:2502.01179. Gates: Louizos et al., "Learning Sparse Neural Networks through L0
    Regularization", 2018, equations 10 to 13.
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
        factory: dict[str, Any] = {
            "dtype": torch.float32 if dtype is None else dtype,
            "device": device,
        }
        count = len(self.heads)
        self.a = nn.Parameter(torch.zeros(count, head_dim, **factory))
        self.v = nn.Parameter(torch.zeros(count, head_dim, **factory))
        self.alpha_a = nn.Parameter(torch.zeros(count, **factory))
        self.alpha_v = nn.Parameter(torch.zeros(count, **factory))

    def gate(self, alpha: Tensor) -> Tensor:
        """Return the gates ``[K]`` of logits ``alpha [K]``: random in training mode."""
        s = alpha
        if self.training:
            u = torch.rand_like(alpha).clamp(1e-6, 1 - 1e-6)
            s = (torch.logit(u) + alpha) / self.temperature
        low, high = self.stretch
        return (torch.sigmoid(s) * (high - low) + low).clamp(0, 1)

    def expected_open(self) -> Tensor:
        """Return the expected number of nonzero gates, a differentiable scalar.

        This is the sum of sigmoid(alpha - beta log(-low / high)) over all gates.
        """
        low, high = self.stretch
        shift = self.temperature * math.log(-low / high)
        return torch.sigmoid(self.alpha_a - shift).sum() + torch.sigmoid(self.alpha_v - shift).sum()

    def _scale_and_bias(self) -> tuple[Tensor, Tensor]:
        scale = 1 + self.gate(self.alpha_a).unsqueeze(1) * self.a
        return scale, self.gate(self.alpha_v).unsqueeze(1) * self.v
