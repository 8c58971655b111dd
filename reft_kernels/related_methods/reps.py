"""RePS: steering along a learned direction, or removal of that direction, for each row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import functional
from reft_kernels.checks import check_edit, describe, mark_rows
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.related_methods.per_example import check_examples, example_ids, expand_per_example

NULLS = ("linear", "relu")


class RePS(nn.Module):
    """The rank-1 intervention of RePS, with a strength f per example or row.

        f != 0   y = h + (f + b) w
        f == 0   y = h - (h . w) / |w|^2 w             with null="linear"
                 y = h - ReLU(h . w + b) / |w|^2 w     with null="relu", as in AxBench's code

    Both cases and all concepts are computed in one launch, with two weight sets per concept.
    Negative f is allowed. To suppress a concept at inference like AxBench, which subtracts b for
    negative f, pass f - 2b. The preference loss is not part of this module.

    Args:
        embed_dim: d.
        num_concepts: C, for w ``[C, d]`` and b ``[C]``. None for w ``[d]`` and b ``[]``.
        null: "linear" or "relu".
        dtype: dtype of the parameters; None means fp32.
        device: Device of the parameters.

    Raises:
        ValueError: If an argument is out of range.

    Source: Wu et al., "Improved Representation Steering for Language Models", 2025,
    arXiv:2505.20809, steering vectors and their null-out intervention. The use of b and ReLU
    follows the paper's code (AxBench, PreferenceVectorIntervention).
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_concepts: int | None = None,
        null: str = "linear",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("embed_dim", embed_dim),
            ("num_concepts", 1 if num_concepts is None else num_concepts),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        if null not in NULLS:
            raise ValueError(f"null: got {null!r}, expected one of {', '.join(NULLS)}")
        self.embed_dim, self.num_concepts, self.null = embed_dim, num_concepts, null
        lead = () if num_concepts is None else (num_concepts,)
        factory: dict[str, Any] = {
            "dtype": torch.float32 if dtype is None else dtype,
            "device": device,
        }
        self.w = nn.Parameter(torch.empty(*lead, embed_dim, **factory))
        self.b = nn.Parameter(torch.empty(lead, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize w as ``nn.Linear`` does, with PyTorch's CPU generator, and set b to 0."""
        bound = self.embed_dim**-0.5
        with torch.no_grad():
            self.w.copy_(torch.empty(self.w.shape).uniform_(-bound, bound))
            self.b.zero_()

    def _concepts(
        self, concepts: Tensor | None, hidden: Tensor, rows: Tensor | None
    ) -> Tensor | None:
        """Return the concept of each row, int64 ``[N]``, or None without ``num_concepts``."""
        if self.num_concepts is None:
            if concepts is not None:
                raise ValueError(
                    "concepts: got a tensor, expected None: num_concepts was not given"
                )
            return None
        shape = (hidden.shape[0],)
        if (
            not isinstance(concepts, Tensor)
            or concepts.dtype not in (torch.int32, torch.int64)
            or concepts.shape != shape
        ):
            raise ValueError(
                f"concepts: got {describe(concepts)}, expected an integer tensor of shape "
                f"{shape}, [B]"
            )
        check_examples(hidden)
        if concepts.device != hidden.device:
            raise ValueError(
                f"concepts: got device {concepts.device}, expected {hidden.device}, where hidden is"
            )
        self._check_values(concepts, self.num_concepts)
        return concepts.long().index_select(0, example_ids(hidden, rows))

    @staticmethod
    def _check_values(concepts: Tensor, num_concepts: int) -> None:
        """Check the values once per tensor, since it synchronizes."""
        if torch.compiler.is_compiling() or not concepts.numel():
            return
        if getattr(concepts, "_reft_checked", None) == (num_concepts, concepts._version):
            return
        low, high = (int(v) for v in torch.stack(torch.aminmax(concepts)).tolist())
        if low < 0 or high >= num_concepts:
            raise ValueError(
                f"concepts: got values from {low} to {high}, expected [0, {num_concepts})"
            )
        mark_rows(concepts, num_concepts)

    def forward(
        self,
        hidden: Tensor,
        strength: Tensor | float,
        *,
        concepts: Tensor | None = None,
        rows: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Edit hidden states.

        Args:
            hidden: ``[..., d]``, or ``[B, T, d]`` if ``strength`` or ``concepts`` is per example.
            strength: f: a number, ``[B]`` (one per example) or ``[N, 1]`` (one per row). Exactly 0
                removes the direction.
            concepts: int32 or int64 ``[B]``, the concept of each example, below num_concepts. None
                without ``num_concepts``.
            rows: See :mod:`reft_kernels.functional`.
            inplace: See :mod:`reft_kernels.functional`.

        Returns:
            The edited hidden states, with the shape and dtype of ``hidden``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        dtype = accumulation_dtype(self.w.dtype)
        w, b = self.w.view(-1, self.embed_dim).to(dtype), self.b.view(-1).to(dtype)
        check_edit(hidden, {"w": w[:1]}, {}, rows, "linear", None, None)
        f = expand_per_example("strength", strength, hidden, rows)
        concept = self._concepts(concepts, hidden, rows)
        squared = w.square().sum(1, keepdim=True)
        null_bias = b.unsqueeze(1) / squared if self.null == "relu" else torch.zeros_like(squared)
        # Set 2c reads the constant 1 (steering), set 2c + 1 the coordinate along w (removal). Both
        # write w.
        read = torch.stack([torch.zeros_like(w), w / squared], 1).view(-1, 1, self.embed_dim)
        read_bias = torch.stack([torch.ones_like(squared), null_bias], 1).view(-1, 1)
        write = w.repeat_interleave(2, 0).unsqueeze(1)
        removed = f == 0
        bias = b if concept is None else b.index_select(0, concept).unsqueeze(1)
        coeff = torch.where(removed, -torch.ones_like(f), f + bias.to(f.dtype))
        sets = removed.squeeze(1).long() + (0 if concept is None else 2 * concept)
        return functional.nodireft(
            hidden,
            write,
            read,
            read_bias,
            rows=rows,
            activation=self.null,
            coeff=coeff,
            weight_ids=mark_rows(sets.to(torch.int32), write.shape[0]),
            inplace=inplace,
        )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_concepts={self.num_concepts}, null={self.null}"
