"""ReFT-r1: a unit direction that detects a concept and steers towards it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels import functional
from reft_kernels.checks import check_edit, check_writable
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.related_methods.per_example import check_examples, example_ids, expand_per_example


class ReftR1(nn.Module):
    """ReFT-r1: h_t + mean(top-k of a) w, with latents a_t = ReLU(h_t . w + b) and |w| = 1.

    As in the paper and its code, one direction detects and steers. It is w = weight / |weight| with
    an unconstrained ``weight [d]``; the authors' code instead normalizes w and projects its
    gradient after each backward pass. The bias b is not part of the paper; ``bias=True`` adds it.
    If an example has fewer than k selected rows, the mean is over those rows.

    Args:
        embed_dim: d.
        topk: k, the number of latents per example that are averaged.
        bias: Whether the latents have a bias b ``[1]``.
        dtype: dtype of the parameters; None means fp32.
        device: Device of the parameters.

    Raises:
        ValueError: If ``embed_dim`` or ``topk`` is less than 1.

    Source: Wu et al., "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse
    Autoencoders", 2025, arXiv:2501.17148, the section on ReFT-r1.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        topk: int = 1,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("embed_dim", embed_dim), ("topk", topk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected an integer >= 1")
        self.embed_dim, self.topk = embed_dim, topk
        factory: dict[str, Any] = {
            "dtype": torch.float32 if dtype is None else dtype,
            "device": device,
        }
        self.weight = nn.Parameter(torch.empty(embed_dim, **factory))
        self.bias = nn.Parameter(torch.empty(1, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the direction uniformly with PyTorch's CPU generator, and set the bias to 0."""
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.embed_dim, dtype=torch.float64))
            if self.bias is not None:
                self.bias.zero_()

    @property
    def direction(self) -> Tensor:
        """The unit vector w ``[d]``, in fp32 (fp64 for fp64 parameters), differentiable."""
        return nn.functional.normalize(self.weight.to(accumulation_dtype(self.weight.dtype)), dim=0)

    def _check(self, hidden: Tensor, rows: Tensor | None) -> None:
        check_edit(hidden, {"weight": self.weight.unsqueeze(0)}, {}, rows, "linear", None, None)
        check_examples(hidden)

    def latents(self, hidden: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Compute the latents a.

        Args:
            hidden: ``[B, T, d]``.
            rows: int32 ``[N]`` or None for all rows.

        Returns:
            ``[B, T]`` in fp32 (fp64 for fp64 ``hidden``); 0 for rows that are not selected.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        self._check(hidden, rows)
        batch, length, d = hidden.shape
        dtype = accumulation_dtype(hidden.dtype)
        flat = hidden.reshape(-1, d)
        selected = flat if rows is None else flat.index_select(0, rows.clamp(min=0))
        z = selected.to(dtype) @ self.direction.to(dtype)
        a = torch.relu(z if self.bias is None else z + self.bias.to(dtype))
        if rows is None:
            return a.view(batch, length)
        # Skipped entries are written to an additional element, which is dropped
        slots = torch.where(rows < 0, batch * length, rows).long()
        return a.new_zeros(batch * length + 1).index_copy(0, slots, a)[:-1].view(batch, length)

    def strength(self, latents: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Return the mean of each example's top k latents.

        Args:
            latents: ``[B, T]``, the result of :meth:`latents`.
            rows: The rows that were passed to :meth:`latents`.

        Returns:
            ``[B]`` in the dtype of ``latents``.
        """
        batch, length = latents.shape
        total = latents.topk(min(self.topk, length), dim=1, sorted=False).values.sum(1)
        if rows is None:
            return total / max(min(self.topk, length), 1)
        examples = torch.where(rows < 0, batch, rows.long() // max(length, 1))
        counts = torch.zeros(batch + 1, dtype=torch.int64, device=rows.device).index_add(
            0, examples, torch.ones_like(examples)
        )
        return total / counts[:-1].clamp(1, self.topk)

    def l1(self, latents: Tensor) -> Tensor:
        """Return the sum of the latents ``[B, T]`` outside each example's top k.

        Training adds this L1 penalty to the loss.
        """
        return (
            latents.sum()
            - latents.topk(min(self.topk, latents.shape[1]), dim=1, sorted=False).values.sum()
        )

    def steer(
        self,
        hidden: Tensor,
        factor: Tensor | float,
        *,
        rows: Tensor | None = None,
        inplace: bool = False,
    ) -> Tensor:
        """Steer with a given strength, as in AxBench: h + factor w.

        Args:
            hidden: ``[..., d]``, or ``[B, T, d]`` if ``factor`` is ``[B]``.
            factor: A number, ``[B]`` (one per example) or ``[N, 1]`` (one per row).
            rows: See :mod:`reft_kernels.functional`.
            inplace: See :mod:`reft_kernels.functional`.

        Returns:
            The edited hidden states, with the shape and dtype of ``hidden``.
        """
        check_edit(hidden, {"weight": self.weight.unsqueeze(0)}, {}, rows, "linear", None, None)
        write = self.direction.unsqueeze(0)
        coeff = expand_per_example("factor", factor, hidden, rows)
        return functional.lobireft(
            hidden, write, torch.ones_like(write[:, 0]), rows=rows, coeff=coeff, inplace=inplace
        )

    def forward(
        self, hidden: Tensor, *, rows: Tensor | None = None, inplace: bool = False
    ) -> Tensor:
        """Edit hidden states.

        Args:
            hidden: ``[B, T, d]``.
            rows: See :mod:`reft_kernels.functional`.
            inplace: See :mod:`reft_kernels.functional`.

        Returns:
            The edited hidden states, with the shape and dtype of ``hidden``.

        Raises:
            TypeError: If an argument has the wrong type or dtype.
            ValueError: If an argument has the wrong shape, device or values.
        """
        self._check(hidden, rows)
        graph = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        if inplace:
            check_writable(hidden, graph)
        # The backward pass of the latents needs the original input. With rows or in half
        # precision, latents() has made a copy of it.
        overwritten = (
            inplace and graph and rows is None and hidden.dtype == accumulation_dtype(hidden.dtype)
        )
        source = hidden.clone() if overwritten else hidden
        strength = self.strength(self.latents(source, rows=rows), rows=rows)
        coeff = strength.index_select(0, example_ids(hidden, rows)).unsqueeze(1)
        return self.steer(hidden, coeff, rows=rows, inplace=inplace)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, topk={self.topk}, bias={self.bias is not None}"
