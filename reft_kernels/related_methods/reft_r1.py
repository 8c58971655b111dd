"""ReFT-r1: one unit direction that both detects a concept and steers towards it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reft_kernels import functional
from reft_kernels.checks import check_edit, check_writable
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.related_methods.per_example import check_examples, example_ids, expand_per_example


class ReftR1(nn.Module):
    """ReFT-r1: a_t = ReLU(h_t . w + b), y_t = h_t + mean(top-k of a over the example's rows) w, |w|
    = 1.

    Variant: one direction detects and steers, as in the paper and its code. ``weight [d]`` is free
    and w = weight / |weight|, which replaces the code's two steps after each backward (norm set to
    1, gradient along w removed). The bias is in neither; ``bias=True`` adds it. An example with
    fewer than k chosen rows takes the mean over those it has.

    Args:
        embed_dim: d. topk: k, the rows of an example whose latents are averaged. bias: whether the
            latent has a bias b ``[1]``.
        dtype: of the parameters, fp32 when None. device: of the parameters.

    Raises:
        ValueError: ``embed_dim`` or ``topk`` below 1.

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
        factory = {"dtype": torch.float32 if dtype is None else dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(embed_dim, **factory))
        self.bias = nn.Parameter(torch.empty(1, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a direction uniformly from the sphere, by torch's CPU generator, and set the bias
        to 0.
        """
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.embed_dim, dtype=torch.float64))
            if self.bias is not None:
                self.bias.zero_()

    @property
    def direction(self) -> Tensor:
        """w ``[d]`` of norm 1, fp32 (fp64 for fp64 parameters), differentiable with respect to
        ``weight``.
        """
        return nn.functional.normalize(self.weight.to(accumulation_dtype(self.weight.dtype)), dim=0)

    def _check(self, hidden: Tensor, rows: Tensor | None) -> None:
        check_edit(hidden, {"weight": self.weight.unsqueeze(0)}, {}, rows, "linear", None, None)
        check_examples(hidden)

    def latents(self, hidden: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """a ``[B, T]`` of ``hidden [B, T, d]``, fp32 (fp64 for fp64), 0 where ``rows`` (int32
        ``[N]``) does not choose.
        """
        self._check(hidden, rows)
        batch, length, d = hidden.shape
        dtype = accumulation_dtype(hidden.dtype)
        flat = hidden.reshape(-1, d)
        chosen = flat if rows is None else flat.index_select(0, rows.clamp(min=0))
        z = chosen.to(dtype) @ self.direction.to(dtype)
        a = torch.relu(z if self.bias is None else z + self.bias.to(dtype))
        if rows is None:
            return a.view(batch, length)
        # skipped entries go to one slot more, which is dropped
        slots = torch.where(rows < 0, batch * length, rows).long()
        return a.new_zeros(batch * length + 1).index_copy(0, slots, a)[:-1].view(batch, length)

    def strength(self, latents: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """mean(top-k) of ``latents [B, T]`` for each example, ``[B]``; ``rows`` as given to
        :meth:`latents`.
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
        """Sum of the ``latents [B, T]`` outside each example's top k: the penalty that training
        adds to its loss.
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
        """h + factor w on the rows of ``hidden``; ``factor`` is a number, ``[B]`` or ``[N, 1]``.
        AxBench steers so.
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
        """The edited ``hidden [B, T, d]``; ``rows`` and ``inplace`` as in
        :mod:`reft_kernels.functional`.

        Raises:
            TypeError, ValueError: ``hidden`` is not ``[B, T, d]`` of this module's d, or ``rows``
                is wrong.
        """
        self._check(hidden, rows)
        graph = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        if inplace:
            check_writable(hidden, graph)
        # the latents' backward needs the input; of chosen rows, or of rows in half precision, it
        # holds a copy anyway
        overwritten = (
            inplace and graph and rows is None and hidden.dtype == accumulation_dtype(hidden.dtype)
        )
        source = hidden.clone() if overwritten else hidden
        strength = self.strength(self.latents(source, rows=rows), rows=rows)
        coeff = strength.index_select(0, example_ids(hidden, rows)).unsqueeze(1)
        return self.steer(hidden, coeff, rows=rows, inplace=inplace)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, topk={self.topk}, bias={self.bias is not None}"
