"""Device functions of the orthonormal maps: r x r products and inverses in fp64.

Each r x r matrix is stored in scratch memory of its program, padded to ``[LD, LD]``, where LD is r
rounded up to a multiple of N, and processed in tiles of ``[N, N]``. The same code thus handles
every r up to 256, and no matrix occupies registers across phases. ``tl.debug_barrier()`` separates
the phases; a program reads only data that its own threads wrote. The padding never enters a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Storage of a matrix and the entries (p, q) that are read; other entries are treated as zero
SCRATCH = tl.constexpr(0)  # [LD, LD], all entries
FULL = tl.constexpr(1)  # [r, r], all entries
LOWER = tl.constexpr(2)  # [r, r], entries with p > q
UPPER = tl.constexpr(3)  # [r, r], entries with p <= q

UNROLLED = tl.constexpr(8)  # largest r for which products are unrolled; such r have one tile


@triton.jit
def entry(matrix, p, q, r: tl.constexpr, LD: tl.constexpr, PART: tl.constexpr):
    """Return the entries (p, q) of a matrix in fp64; p and q are broadcast."""
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
def load_square(matrix, k, j, r: tl.constexpr, LD: tl.constexpr):
    """Return the entries (k, j) of a scratch matrix in fp32, zero for indices from r; 1-D k, j."""
    k = k[:, None]
    j = j[None, :]
    return tl.load(matrix + k * LD + j, mask=(k < r) & (j < r), other=0.0).to(tl.float32)


@triton.jit
def save(matrix, p, q, r: tl.constexpr, value):
    """Store a tile of an ``[r, r]`` output at (p, q), rounded to its dtype."""
    tl.store(matrix + p * r + q, value.to(matrix.dtype.element_ty), mask=(p < r) & (q < r))


@triton.jit
def product(
    A,
    B,
    i,
    j,
    r: tl.constexpr,
    first,
    last,
    N: tl.constexpr,
    LD: tl.constexpr,
    A_PART: tl.constexpr,
    A_T: tl.constexpr,
    B_PART: tl.constexpr,
    B_T: tl.constexpr,
):
    """Return the tile (i, j) of A B, summed over first <= k < last, in fp64.

    A_T and B_T transpose the stored matrix; A_PART and B_PART are storage kinds as above.
    """
    acc = tl.zeros([N, N], tl.float64)
    if r <= UNROLLED:
        for step in tl.static_range(r):  # all loads are in flight at once
            k = tl.full([1, 1], step, tl.int32)
            a = entry(A, k, i, r, LD, A_PART) if A_T else entry(A, i, k, r, LD, A_PART)
            b = entry(B, j, k, r, LD, B_PART) if B_T else entry(B, k, j, r, LD, B_PART)
            acc += a * b
    else:
        for step in tl.range(first, last):
            k = tl.full([1, 1], 0, tl.int32) + step
            a = entry(A, k, i, r, LD, A_PART) if A_T else entry(A, i, k, r, LD, A_PART)
            b = entry(B, j, k, r, LD, B_PART) if B_T else entry(B, k, j, r, LD, B_PART)
            acc += a * b
    return acc


@triton.jit
def _invert_tile(A, N: tl.constexpr):
    """Return the inverse of an ``[N, N]`` tile by Gauss-Jordan elimination without pivoting."""
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
def invert(A, rank, r: tl.constexpr, N: tl.constexpr, LD: tl.constexpr):
    """Invert A in scratch memory in place, by block Gauss-Jordan elimination without pivoting.

    This is stable if every leading block is far from singular: for triangular A, and for A with
    positive definite symmetric part. ``rank`` is r, but not a constexpr.
    """
    offsets = tl.arange(0, N)
    blocks = tl.cdiv(rank, N)
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
def signs_of(signs, layer, j, r: tl.constexpr, NEGATE: tl.constexpr):
    """Return the signs of the columns j in fp64 (1 if ``signs`` is None), negated with NEGATE."""
    scale = tl.full(j.shape, -1.0 if NEGATE else 1.0, tl.float64)
    if signs is not None:
        scale *= tl.load(signs + layer * r + j, mask=j < r, other=1.0).to(tl.float64)
    return scale
