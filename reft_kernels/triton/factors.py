"""The small factors of the edit's backward pass, [N, r], in the form in which products read them.

The first launch of the backward pass writes dz, coeff * u and ddelta once; every program of the
second launch reads them as operands of matrix products. Their form depends on TERMS:

    TERMS  hidden states  row of a factor
    0      fp32           BLOCK_R fp32 values
    1      bf16, fp16     16 bf16 values: 8 high terms, then 8 low terms (r <= 8)
    2      bf16, fp16     2 * BLOCK_R bf16 values: the high terms, then the low terms

v is rounded to high + low, which keeps about 16 bits of its mantissa, in the range of fp32. With
TERMS = 1 both terms are the 16 rows of one product on tensor cores, so the low term costs nothing.
A row has BLOCK_R 4-byte words in each form. Its padding is zero, as are rows that are skipped, so
that the second launch needs no mask for the rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from reft_kernels.triton import common


def terms(rank: int, dtype: torch.dtype) -> int:
    """Return TERMS for a rank and the dtype of the hidden states."""
    if dtype == torch.float32:
        return 0
    return 1 if rank <= 8 else 2


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Return BLOCK_R: the rank padded to a power of two, at least 8 with TERMS = 1, else 16."""
    return max(8 if terms(rank, dtype) == 1 else common.MIN_DOT, common.next_power_of_2(rank))


def precision(dtype: torch.dtype) -> str | None:
    """Return PRECISION of products of factors, for a dtype of the hidden states.

    None: the operands are bf16 terms. The interpreter computes bf16 products incorrectly, so the
    terms are converted to fp32 there.
    """
    return "ieee" if common.INTERPRETING else common.dot_precision(dtype)


@triton.jit
def pointer(words, TERMS: tl.constexpr):
    """Return a pointer to 4-byte words as a pointer to a factor's elements."""
    if TERMS == 0:
        return words
    else:
        return words.to(tl.pointer_type(tl.bfloat16))


@triton.jit
def store(words, n, i, v, mask, BLOCK_R: tl.constexpr, TERMS: tl.constexpr):
    """Store the factor v ``[BLOCK_N, BLOCK_R]`` of the entries n."""
    target = pointer(words, TERMS)
    if TERMS == 0:
        tl.store(target + n.to(tl.int64)[:, None] * BLOCK_R + i[None, :], v, mask=mask)
    else:
        offsets = n.to(tl.int64)[:, None] * (2 * BLOCK_R) + i[None, :]
        high = v.to(tl.bfloat16)
        tl.store(target + offsets, high, mask=mask)
        low = (v - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(target + BLOCK_R + offsets, low, mask=mask)


@triton.jit
def load(words, first, active, BLOCK_R: tl.constexpr, TERMS: tl.constexpr):
    """Return (high, low) of a factor's rows from ``first`` on, ``[N, R]``.

    Both are the row unless TERMS is 2. The offsets from the first row take 32 bits, in the same
    registers for all factors.
    """
    WIDTH: tl.constexpr = 16 if TERMS == 1 else BLOCK_R
    PITCH: tl.constexpr = 2 * BLOCK_R if TERMS == 2 else WIDTH
    source = pointer(words, TERMS) + first * PITCH
    offsets = tl.arange(0, active.shape[0])[:, None] * PITCH + tl.arange(0, WIDTH)[None, :]
    high = tl.load(source + offsets, mask=active[:, None], other=0.0)
    low = high
    if TERMS == 2:
        low = tl.load(source + BLOCK_R + offsets, mask=active[:, None], other=0.0)
    return high, low


@triton.jit
def load_transposed(
    words,
    first,
    active,
    FIRST: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Return RANKS columns from FIRST on of what :func:`load` returns, transposed.

    A factor is loaded once for each orientation, since a load is pipelined into shared memory only
    if all products that use it read one layout, and a transposed register tile is not pipelined.
    With TERMS = 1 all 16 columns are loaded.
    """
    WIDTH: tl.constexpr = 16 if TERMS == 1 else RANKS
    PITCH: tl.constexpr = 16 if TERMS == 1 else 2 * BLOCK_R if TERMS == 2 else BLOCK_R
    source = pointer(words, TERMS) + (first * PITCH + FIRST)
    offsets = tl.arange(0, active.shape[0])[None, :] * PITCH + tl.arange(0, WIDTH)[:, None]
    high = tl.load(source + offsets, mask=active[None, :], other=0.0)
    low = high
    if TERMS == 2:
        low = tl.load(source + BLOCK_R + offsets, mask=active[None, :], other=0.0)
    return high, low


@triton.jit
def load_parts(
    words, first, active, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, TERMS: tl.constexpr
):
    """Return (high, low) of each of PARTS parts of a factor's ranks, transposed, in one tuple."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts += load_transposed(
            words, first, active, part * (BLOCK_R // PARTS), BLOCK_R // PARTS, BLOCK_R, TERMS
        )
    return parts


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Return a tuple with zeros ``[ROWS, COLUMNS]`` for each part."""
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.zeros((ROWS, COLUMNS), tl.float32),)  # type: ignore[assignment]
    return parts


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b. With PRECISION, both operands are converted to fp32."""
    if PRECISION is None:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def outer(acc, high, low, x, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + v^T x for a factor v, given as v^T, and a tile x ``[N, D]`` of hidden states.

    An fp16 tile is the exact sum of two bf16 terms.
    """
    if TERMS == 0:
        acc = product(high, x, acc, PRECISION)
    elif x.dtype == tl.float16:
        x_high, x_low = common.truncated_terms(x.to(tl.float32))
        acc = product(high, x_high, acc, PRECISION)
        acc = product(high, x_low, acc, PRECISION)
        if TERMS == 2:
            acc = product(low, x_high, acc, PRECISION)
    else:
        acc = product(high, x, acc, PRECISION)
        if TERMS == 2:
            acc = product(low, x, acc, PRECISION)
    return acc


@triton.jit
def outers(accs, terms, x, PARTS: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return :func:`outer` for each part, given the tuple of :func:`load_parts`."""
    results = ()
    for part in tl.static_range(PARTS):
        high, low = terms[2 * part], terms[2 * part + 1]
        results += (outer(accs[part], high, low, x, TERMS, PRECISION),)  # type: ignore[assignment]
    return results


@triton.jit
def row_sums(
    accs,
    terms,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add each part of a factor v, given by :func:`load_parts`, to its sum over rows.

    With TERMS > 0, each of the 16 columns of a sum is the sum, a product with ones; otherwise its
    columns, one for each row of the tile, are yet to be added.
    """
    if TERMS == 0:
        results = ()
        for part in tl.static_range(PARTS):
            results += (accs[part] + terms[2 * part],)  # type: ignore[assignment]
        return results
    else:
        ones = tl.full((BLOCK_N, 16), 1.0, terms[0].dtype)
        return outers(accs, terms, ones, PARTS, TERMS, PRECISION)


@triton.jit
def gram(acc, high, low, other_high, other_low, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + v^T w for two factors, given as v^T and w.

    With TERMS = 2 the product of their low terms is omitted.
    """
    acc = product(high, other_high, acc, PRECISION)
    if TERMS == 2:
        acc = product(low, other_high, acc, PRECISION)
        acc = product(high, other_low, acc, PRECISION)
    return acc


@triton.jit
def subtract_product(acc, v, w_high, w_low, PRECISION: tl.constexpr):
    """Return acc - v w for fp32 v, split into bf16 terms, and weights w in bf16 terms."""
    high, low = common.truncated_terms(-v)
    acc = product(high, w_high, acc, PRECISION)
    acc = product(low, w_high, acc, PRECISION)
    return product(high, w_low, acc, PRECISION)


@triton.jit
def expand(
    acc, high, low, w_high, w_low, EXACT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr
):
    """Return acc + v w for a factor v and weights w given as (w_high, w_low).

    Without EXACT only the weights' high terms are used, and v's high term unless TERMS is 1: the
    rounding of a computation in bf16.
    """
    acc = product(high, w_high, acc, PRECISION)
    if EXACT and TERMS > 0:
        acc = product(high, w_low, acc, PRECISION)
        if TERMS == 2:
            acc = product(low, w_high, acc, PRECISION)
    return acc


@triton.jit
def weight_terms(w, TERMS: tl.constexpr):
    """Return the terms (high, low) of fp32 weights for :func:`expand`."""
    if TERMS == 0:
        return w, w
    else:
        high = w.to(tl.bfloat16)
        return high, (w - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def fold(acc, D: tl.constexpr, BLOCK_R: tl.constexpr, TERMS: tl.constexpr):
    """Return the sum ``[BLOCK_R, D]`` of the rows of high and of low terms in acc."""
    if TERMS == 1:
        return tl.sum(tl.reshape(acc, (2, BLOCK_R, D)), 0)
    else:
        return acc
