"""The roundings of the Triton kernels' products, in plain PyTorch.

Triton's interpreter computes these products exactly, so it does not show their rounding errors. A
product of two bf16 or of two tf32 numbers is exact in fp32; sums are in fp32, block by block as in
the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32  # columns or rows of a step of the kernels' sums
Split = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def rounded(v: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return high and low terms of fp32 v, both rounded to ``dtype``, as fp32."""
    high = v.to(dtype).float()
    return high, (v - high).to(dtype).float()


def truncated(v: Tensor, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return bf16 high and low terms of fp32 v, both truncated, as fp32."""
    assert dtype == torch.bfloat16, "only bf16 is the upper half of fp32"
    high = _upper_half(v)
    return high, _upper_half(v - high)


def _upper_half(v: Tensor) -> Tensor:
    return (v.contiguous().view(torch.int32) & -0x10000).view(torch.float32)


def tf32(v: Tensor) -> Tensor:
    """Round fp32 to tf32, ties away from zero, as ``cvt.rna.tf32.f32`` does."""
    bits = v.contiguous().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32)


def summed(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of products a b, accumulated in fp32 over blocks of the inner dimension."""
    total = torch.zeros(pairs[0][0].shape[0], pairs[0][1].shape[1])
    for start in range(0, pairs[0][0].shape[1], BLOCK):
        for a, b in pairs:
            total += a[:, start : start + BLOCK] @ b[start : start + BLOCK]
    return total


def three_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b from three tf32 products (``tf32x3``)."""
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    return summed([(a_low, b_high), (a_high, b_low), (a_high, b_high)])


def one_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Return a b from one tf32 product."""
    return summed([(tf32(a), tf32(b))])


def two_terms(x: Tensor, v: Tensor, split: Split) -> Tensor:
    """Return x v for x in half precision and fp32 v as two terms of x's dtype."""
    high, low = split(v, x.dtype)
    return summed([(x.float(), high), (x.float(), low)])


def three_terms(v: Tensor, w: Tensor, split: Split) -> Tensor:
    """Return v w for fp32 v and w as bf16 terms; the product of the low terms is omitted."""
    v_high, v_low = split(v, torch.bfloat16)
    w_high, w_low = split(w, torch.bfloat16)
    return v_high @ w_high + (v_low @ w_high + v_high @ w_low)
