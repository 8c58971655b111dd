"""Tiles of the tall matrices of the orthonormal maps, and products over them in fp32.

A tall matrix is X or a base ``[d, r]``, of which the strictly lower triangular part or the part
below the first r rows counts, or the total gradient, given as ``[r, d]``. Loads have no mask that
differs between neighbouring columns, so that they are 128 bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reft_kernels.triton.small_linalg import load_square


@triton.jit
def all_rows(X, row, col, d, r: tl.constexpr, WIDTH: tl.constexpr):
    """Return X[row, col] in fp32, zero outside of X, for ``[rows, WIDTH]`` indices."""
    keep = row < d
    if r % WIDTH != 0:
        keep = keep & (col < r)
    return tl.load(X + row * r + col, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def lower_part(X, row, col, d, r: tl.constexpr, WIDTH: tl.constexpr, BELOW: tl.constexpr):
    """Return the entries (row, col) of tril(X, -1), or with BELOW of [0; X[r:]], in fp32.

    Indices as in :func:`all_rows`.
    """
    value = all_rows(X, row, col, d, r, WIDTH)
    return tl.where((row >= r) if BELOW else (row > col), value, 0.0)


@triton.jit
def total_gradient(grad_R, grad_D, row, col, d, r: tl.constexpr, WIDTH: tl.constexpr):
    """Return the entries (row, col) of (grad_R - grad_D)^T in fp32, zero outside of it.

    grad_R and grad_D are ``[r, d]`` or None, but not both None. ``col`` covers multiples of WIDTH.
    """
    keep = row < d
    if r % WIDTH != 0:
        keep = keep & (col < r)
    at = col * d + row
    if grad_D is None:
        total = tl.load(grad_R + at, mask=keep, other=0.0).to(tl.float32)
    else:
        total = -tl.load(grad_D + at, mask=keep, other=0.0).to(tl.float32)
        if grad_R is not None:
            total += tl.load(grad_R + at, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def operand(
    A,
    grad_R,
    grad_D,
    row,
    col,
    d,
    r: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    BELOW: tl.constexpr,
):
    """Return a tile ``[rows, WIDTH]`` of A, or of the total gradient if A is None, in fp32.

    row and col are 1-D. TOP says whether row may contain some of the first r rows. They are the
    only ones of which a part is ignored.
    """
    if A is None:
        return tl.trans(total_gradient(grad_R, grad_D, row[None, :], col[:, None], d, r, WIDTH))
    elif TOP:
        return lower_part(A, row[:, None], col[None, :], d, r, WIDTH, BELOW)
    else:
        return all_rows(A, row[:, None], col[None, :], d, r, WIDTH)


@triton.jit
def _two_sum(high, low, value):
    """Return the fp32 sum high + value, and low plus the rounding error of that sum (Knuth).

    fp64 additions would be slow on consumer GPUs.
    """
    total = high + value
    added = total - high
    return total, low + ((high - (total - added)) + (value - added))


@triton.jit
def gram(
    A,
    B,
    grad_R,
    grad_D,
    i,
    j,
    first,
    last,
    d,
    r: tl.constexpr,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    A_BELOW: tl.constexpr,
    B_BELOW: tl.constexpr,
):
    """Return the tile (i, j) of A^T B, summed over the rows first <= row < last, in fp64.

    i and j are ``[N]``. A and B are strictly lower triangular parts; B may be None for the total
    gradient. The unit diagonal is excluded, because adding it in fp32 would round the smaller
    entries. first is a multiple of BLOCK_D.
    """
    # Blocks that contain some of the first r rows are loaded by a loop of their own
    top = tl.minimum(tl.cdiv(r, BLOCK_D) * BLOCK_D, last)
    rows = tl.arange(0, BLOCK_D)
    if N < 16:
        # A short fp32 sum for each row of the block; these are added in fp64
        parts = tl.zeros([BLOCK_D, N, N], tl.float32)
        for start in tl.range(first, top, BLOCK_D, num_stages=1):
            a = operand(A, None, None, start + rows, i, d, r, N, True, A_BELOW)
            b = operand(B, grad_R, grad_D, start + rows, j, d, r, N, True, B_BELOW)
            parts += a[:, :, None] * b[:, None, :]
        for start in tl.range(tl.maximum(first, top), last, BLOCK_D, num_stages=STAGES):
            a = operand(A, None, None, start + rows, i, d, r, N, False, A_BELOW)
            b = operand(B, grad_R, grad_D, start + rows, j, d, r, N, False, B_BELOW)
            parts += a[:, :, None] * b[:, None, :]
        return tl.sum(parts.to(tl.float64), axis=0)
    else:
        high = tl.zeros([N, N], tl.float32)
        low = tl.zeros([N, N], tl.float32)
        for start in tl.range(first, top, BLOCK_D, num_stages=1):
            a = operand(A, None, None, start + rows, i, d, r, N, True, A_BELOW)
            b = operand(B, grad_R, grad_D, start + rows, j, d, r, N, True, B_BELOW)
            high, low = _two_sum(high, low, tl.dot(tl.trans(a), b, input_precision="ieee"))
        for start in tl.range(tl.maximum(first, top), last, BLOCK_D, num_stages=STAGES):
            a = operand(A, None, None, start + rows, i, d, r, N, False, A_BELOW)
            b = operand(B, grad_R, grad_D, start + rows, j, d, r, N, False, B_BELOW)
            high, low = _two_sum(high, low, tl.dot(tl.trans(a), b, input_precision="ieee"))
        return high.to(tl.float64) + low.to(tl.float64)


@triton.jit
def _multiply(acc, x, m, BLOCK_K: tl.constexpr, AS_R: tl.constexpr):
    """Return acc + x m, or with AS_R its transpose."""
    if AS_R:
        if BLOCK_K == 1:
            return acc + tl.trans(m) * tl.trans(x)
        else:
            return tl.dot(tl.trans(m), tl.trans(x), acc, input_precision="ieee")
    elif BLOCK_K == 1:
        return acc + x * m
    else:
        return tl.dot(x, m, acc, input_precision="ieee")


@triton.jit
def add_product(
    acc,
    m,
    M,
    A,
    grad_R,
    grad_D,
    c,
    j,
    d,
    rank,
    r: tl.constexpr,
    LD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOP: tl.constexpr,
    BELOW: tl.constexpr,
    AS_R: tl.constexpr,
):
    """Return acc + A M at the rows c and columns j, in fp32.

    Args:
        acc: ``[BLOCK_C, BLOCK_J]``, or its transpose with ``AS_R``.
        m: ``load_square(M, k, j)`` for all k if r <= BLOCK_K; else not read.
        M: Scratch matrix.
        A, grad_R, grad_D, TOP, BELOW: As in :func:`operand`.
        c, j: 1-D indices.
        d, r: Sizes of A. ``rank`` is r, but not a constexpr.
    """
    k = tl.arange(0, BLOCK_K)
    if r <= BLOCK_K:
        x = operand(A, grad_R, grad_D, c, k, d, r, BLOCK_K, TOP, BELOW)
        acc = _multiply(acc, x, m, BLOCK_K, AS_R)
    else:
        for start in tl.range(0, rank, BLOCK_K):
            x = operand(A, grad_R, grad_D, c, start + k, d, r, BLOCK_K, TOP, BELOW)
            acc = _multiply(acc, x, load_square(M, start + k, j, r, LD), BLOCK_K, AS_R)
    return acc
