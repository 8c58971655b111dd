"""Products of bf16 terms and of tf32 terms keep the error budget of :mod:`tests.budget`.

An edit and its backward pass are computed with the kernels' products (:mod:`tests.triton.roundings`),
for edits as large as the hidden state and for edits much larger.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests import budget, inputs, plain
from tests.triton import roundings

ROWS = 40
DRAWS = 3
SHAPES = [(64, 1), (768, 4), (4096, 8), (1024, 16), (2048, 32), (8192, 64)]
LARGE = 30.0  # factor of edits that are much larger than the hidden state


class Products(NamedTuple):
    """How a kernel multiplies.

    Attributes:
        split: Terms of half precision, or None for fp32 hidden states.
        wide: Product of fp32 matrices, for fp32 hidden states.
        one_term: Whether u R and dz (W - R) are products of single bf16 terms, as for bf16.
        rounded_read: Whether the forward pass takes W - R rounded to bf16, as stacked modules do.
    """

    split: roundings.Split | None
    wide: object = None
    one_term: bool = False
    rounded_read: bool = False

    def with_state(self, x: Tensor, v: Tensor) -> Tensor:
        """Return x v for a hidden state x and fp32 v."""
        return self.wide(x, v) if self.split is None else roundings.two_terms(x, v, self.split)

    def project(self, x: Tensor, v: Tensor) -> Tensor:
        """Return x v in the forward pass."""
        if self.rounded_read:
            return roundings.summed([(x.float(), v.bfloat16().float())])
        return self.with_state(x, v)

    def small(self, v: Tensor, w: Tensor) -> Tensor:
        """Return v w for fp32 v and w with inner dimension r."""
        return self.wide(v, w) if self.split is None else roundings.three_terms(v, w, self.split)

    def update(self, v: Tensor, w: Tensor) -> Tensor:
        """Return v w for what is added to a hidden state or its gradient."""
        if self.one_term:
            return v.bfloat16().float() @ w.bfloat16().float()
        return self.small(v, w)


class _Edit(torch.autograd.Function):
    """y = x + (x (W - R)^T + b) R, with x saved or recomputed from y."""

    @staticmethod
    def forward(ctx, x, W, b, R, products, saves):
        u = products.project(x, (W - R).mT) + b
        y = (x.float() + products.update(u, R)).to(x.dtype)
        ctx.save_for_backward(x if saves else y, u, W, R)
        ctx.products, ctx.saves = products, saves
        return y

    @staticmethod
    def backward(ctx, g):
        x, u, W, R = ctx.saved_tensors
        products = ctx.products
        if not ctx.saves:
            x = (x.float() - products.small(u, R)).to(x.dtype)
        dz = products.with_state(g, R.mT)
        grad_W = products.with_state(x.mT, dz).mT
        grad_R = products.with_state(g.mT, u).mT - grad_W
        grad_x = (g.float() + products.update(dz, W - R)).to(g.dtype)
        return grad_x, grad_W, dz.sum(0), grad_R, None, None


def _draw(d: int, r: int, dtype: torch.dtype, size: float, products, saves: bool) -> budget.Draw:
    """Return a draw in which the elements of the edit are ``size`` times those of the state."""
    case = inputs.Case((ROWS,), d, r)
    weights = inputs.weights("loreft", case)
    scale = size * (d / r) ** 0.5
    weights["W"], weights["b"] = weights["W"] * scale, weights["b"] * scale
    return budget.Draw(
        {"hidden": torch.randn(ROWS, d).to(dtype), **weights},
        lambda hidden, W, b, R: _Edit.apply(hidden, W, b, R, products, saves),
        lambda hidden, **given: plain.edit("loreft", hidden, given),
    )


KINDS = {
    "bf16-rounded": (torch.bfloat16, Products(roundings.rounded)),
    "bf16-truncated": (torch.bfloat16, Products(roundings.truncated)),
    "bf16-one-term": (torch.bfloat16, Products(roundings.truncated, one_term=True)),
    "bf16-weights": (
        torch.bfloat16,
        Products(roundings.truncated, one_term=True, rounded_read=True),
    ),
    "fp16-rounded": (torch.float16, Products(roundings.rounded)),
    "tf32x3": (torch.float32, Products(None, roundings.three_tf32)),
}


@pytest.mark.parametrize("d, r", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saves", (True, False), ids=("saved", "recomputed"))
def test_edits_keep_the_budget(d, r, kind, saves):
    dtype, products = KINDS[kind]
    budget.check(lambda: _draw(d, r, dtype, 1.0, products, saves), dtype, draws=DRAWS)


@pytest.mark.parametrize("d, r", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_large_edits_keep_the_budget(d, r, kind):
    dtype, products = KINDS[kind]
    budget.check(lambda: _draw(d, r, dtype, LARGE, products, True), dtype, draws=DRAWS)


def test_one_tf32_product_does_not_keep_the_budget():
    products = Products(None, roundings.one_tf32)
    with pytest.raises(AssertionError, match="over the budget"):
        budget.check(lambda: _draw(768, 8, torch.float32, 1.0, products, True), torch.float32)


@pytest.mark.parametrize(
    "split, bits", [(roundings.rounded, 16), (roundings.truncated, 14)], ids=("round", "truncate")
)
def test_two_terms_keep_the_mantissa(split, bits):
    v = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    high, low = split(v, torch.bfloat16)
    for term in (high, low):
        assert torch.equal(term, term.bfloat16().float())
    error = ((v - high - low).abs() / v.abs()).max()
    assert error <= 2.0**-bits


def test_tf32_rounds_to_ten_bits():
    v = torch.randn(10_000)
    assert torch.equal(roundings.tf32(roundings.tf32(v)), roundings.tf32(v))
    assert ((v - roundings.tf32(v)).abs() / v.abs()).max() <= 2.0**-11
    assert float(roundings.tf32(torch.tensor(1 + 2.0**-11))) == 1 + 2.0**-10  # a tie
