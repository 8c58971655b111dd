"""Device functions behind the orthonormal maps: Gram sums over d, and r x r products and inverses
in fp64.

Every r x r matrix lives in a program's own scratch memory, padded to ``[LD, LD]`` with LD the
multiple of N next to r, and is
worked on in tiles of ``[N, N]``: any r up to 256 runs through the same code, and no matrix occupies
registers across phases. Phases are separated by ``tl.debug_barrier()``: a program reads what its
own threads wrote, never what another program wrote. What the padding holds never enters a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

# how a matrix is stored, and which of its entries (p, q) count; the others read as zero
SCRATCH = tl.constexpr(0)  # [LD, LD], all
FULL = tl.constexpr(1)  # [r, r], all
LOWER = tl.constexpr(2)  # [r, r], p > q
UPPER = tl.constexpr(3)  # [r, r], p <= q


@triton.jit
def entry(matrix, p, q, r, LD: tl.constexpr, PART: tl.constexpr):
    """Entries (p, q) of a matrix in fp64; p and q broadcast."""
    if PART == SCRATCH:
        value = tl.load(matrix + p * LD + q)
    else:
        keep = (p < r) & (q < r)
        if PART == LOWER:
            keep = keep & (p > q)
        if PART == UPPER:
            keep = keep & (p <= q)
        value = tl.load(matrix + p * r + q, mask=keep, other=0.0)
    return value.to(tl.float64)


@triton.jit
def put(matrix, p, q, LD: tl.constexpr, value):
    """Store an ``[N, N]`` tile of a scratch matrix at (p, q), rounded to the matrix's dtype."""
    tl.store(matrix + p * LD + q, value.to(matrix.dtype.element_ty))


@triton.jit
def save(matrix, p, q, r, value):
    """Store a tile of an ``[r, r]`` output at (p, q), rounded to its dtype."""
    tl.store(matrix + p * r + q, value.to(matrix.dtype.element_ty), mask=(p < r) & (q < r))


@triton.jit
def product(
    A,
    B,
    i,
    j,
    r,
    first,
    last,
    N: tl.constexpr,
    LD: tl.constexpr,
    A_PART: tl.constexpr,
    A_T: tl.constexpr,
    B_PART: tl.constexpr,
    B_T: tl.constexpr,
):
    """The tile (i, j) of A B, summed over first <= k < last in fp64; A_T, B_T read a stored
    matrix transposed.
    """
    acc = tl.zeros([N, N], tl.float64)
    for step in tl.range(first, last):
        k = tl.full([1, 1], 0, tl.int32) + step
        a = entry(A, k, i, r, LD, A_PART) if A_T else entry(A, i, k, r, LD, A_PART)
        b = entry(B, j, k, r, LD, B_PART) if B_T else entry(B, k, j, r, LD, B_PART)
        acc += a * b
    return acc


@triton.jit
def _invert_tile(A, N: tl.constexpr):
    """A^-1 of an ``[N, N]`` tile by Gauss-Jordan elimination in place, without pivoting."""
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    for k in tl.range(0, N):
        row = tl.sum(tl.where(i == k, A, 0.0), axis=0)[None, :]
        column = tl.sum(tl.where(j == k, A, 0.0), axis=1)[:, None]
        pivot = tl.sum(tl.sum(tl.where((i == k) & (j == k), A, 0.0), axis=1), axis=0)
        row = tl.where(j == k, 1.0, row) / pivot
        A = tl.where((i == k) | (j == k), 0.0, A) - tl.where(i == k, -1.0, column) * row
    return A


@triton.jit
def invert(A, r, N: tl.constexpr, LD: tl.constexpr):
    """A <- A^-1 in place, A in scratch: Gauss-Jordan by blocks of N, without pivoting.

    Stable where every leading block is far from singular: triangular A, and A with positive
    definite symmetric part.
    """
    offsets = tl.arange(0, N)
    blocks = tl.cdiv(r, N)
    for block in tl.range(0, blocks):
        first = block * N
        last = tl.minimum(first + N, r)
        p = (first + offsets)[:, None]
        q = (first + offsets)[None, :]
        tile = entry(A, p, q, r, LD, SCRATCH)
        tile = _invert_tile(
            tl.where((p < r) & (q < r), tile, (p == q).to(tl.float64)), N
        )  # identity padding
        tl.debug_barrier()
        put(A, p, q, LD, tile)
        tl.debug_barrier()
        if LD > N:
            for other in tl.range(0, blocks):  # A[k, j] <- A[k, k]^-1 A[k, j]
                if other != block:
                    j = (other * N + offsets)[None, :]
                    tile = product(
                        A, A, p, j, r, first, last, N, LD, SCRATCH, False, SCRATCH, False
                    )
                    tl.debug_barrier()
                    put(A, p, j, LD, tile)
            tl.debug_barrier()
            for bi in tl.range(0, blocks):  # A[i, j] <- A[i, j] - A[i, k] A[k, j]
                for bj in tl.range(0, blocks):
                    if (bi != block) & (bj != block):
                        i = (bi * N + offsets)[:, None]
                        j = (bj * N + offsets)[None, :]
                        tile = entry(A, i, j, r, LD, SCRATCH)
                        tile -= product(
                            A, A, i, j, r, first, last, N, LD, SCRATCH, False, SCRATCH, False
                        )
                        tl.debug_barrier()
                        put(A, i, j, LD, tile)
            tl.debug_barrier()
            for other in tl.range(0, blocks):  # A[i, k] <- -A[i, k] A[k, k]^-1
                if other != block:
                    i = (other * N + offsets)[:, None]
                    tile = -product(
                        A, A, i, q, r, first, last, N, LD, SCRATCH, False, SCRATCH, False
                    )
                    tl.debug_barrier()
                    put(A, i, q, LD, tile)
            tl.debug_barrier()


@triton.jit
def lower_part(X, row, col, d, r, BELOW: tl.constexpr):
    """Entries (row, col) of tril(X, -1), or of [0; X[r:]] where BELOW, in fp32; row and col
    broadcast, X is ``[d, r]``.
    """
    keep = (row < d) & (col < r) & ((row >= r) if BELOW else (row > col))
    return tl.load(X + row * r + col, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def total_gradient(grad_R, grad_D, row, col, d, r):
    """Entries (row, col) of (grad_R - grad_D)^T in fp32; grad_R and grad_D are ``[r, d]`` or
    None, not both.
    """
    keep = (row < d) & (col < r)
    at = col * d + row
    if grad_D is None:
        total = tl.load(grad_R + at, mask=keep, other=0.0).to(tl.float32)
    else:
        total = -tl.load(grad_D + at, mask=keep, other=0.0).to(tl.float32)
        if grad_R is not None:
            total += tl.load(grad_R + at, mask=keep, other=0.0).to(tl.float32)
    return total


@triton.jit
def _operand(B, grad_R, grad_D, row, col, d, r, BELOW: tl.constexpr):
    return (
        total_gradient(grad_R, grad_D, row, col, d, r)
        if B is None
        else lower_part(B, row, col, d, r, BELOW)
    )


@triton.jit
def multiply_square(
    acc,
    M,
    A,
    grad_R,
    grad_D,
    j,
    c,
    d,
    r,
    LD: tl.constexpr,
    A_BELOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + (A M)^T at (j, c), ``[BLOCK_J, BLOCK_C]``, in fp32: M fp32 in scratch, A as in
    :func:`gram` (None: total gradient).

    One loop for each factor keeps the addresses of one pair of operands in registers.
    """
    for start in tl.range(0, r, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        m = tl.load(
            M + k[None, :] * LD + j[:, None], mask=(k[None, :] < r) & (j[:, None] < r), other=0.0
        )
        acc = tl.dot(
            m,
            _operand(A, grad_R, grad_D, c[None, :], k[:, None], d, r, A_BELOW),
            acc,
            input_precision="ieee",
        )
    return acc


@triton.jit
def gram(
    A,
    B,
    grad_R,
    grad_D,
    i,
    j,
    d,
    r,
    N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    A_BELOW: tl.constexpr,
    B_BELOW: tl.constexpr,
):
    """The tile (i, j) of A^T B over all d rows, in fp64; i and j are ``[N]``; B None stands for the
    total gradient.

    A and B are strictly lower parts, without a unit diagonal: next to it the other entries would
    lose their last bits.
    """
    rows = tl.arange(0, BLOCK_D)
    if N < 16:
        # a sum per row of the block: BLOCK_D short fp32 sums, joined in fp64
        parts = tl.zeros([BLOCK_D, N, N], tl.float32)
        for start in tl.range(0, d, BLOCK_D):
            row = (start + rows)[:, None]
            a = lower_part(A, row, i[None, :], d, r, A_BELOW)
            b = _operand(B, grad_R, grad_D, row, j[None, :], d, r, B_BELOW)
            parts += a[:, :, None] * b[:, None, :]
        return tl.sum(parts.to(tl.float64), axis=0)
    else:
        high = tl.zeros([N, N], tl.float32)
        low = tl.zeros([N, N], tl.float32)
        for start in tl.range(0, d, BLOCK_D):
            row = start + rows
            a = lower_part(A, row[None, :], i[:, None], d, r, A_BELOW)
            b = _operand(B, grad_R, grad_D, row[:, None], j[None, :], d, r, B_BELOW)
            tile = tl.dot(a, b, input_precision="ieee")
            # TwoSum (Knuth): what the fp32 sum loses goes to `low`; fp64 adds would be slow on
            # consumer GPUs
            sum_ = high + tile
            seen = sum_ - high
            low += (high - (sum_ - seen)) + (tile - seen)
            high = sum_
        return high.to(tl.float64) + low.to(tl.float64)
