"""First launch of the orthonormal maps and of their backward: partial sums over the d rows."""

from __future__ import annotations

import triton
import triton.language as tl

from reft_kernels.triton.small_linalg import put
from reft_kernels.triton.tall_tiles import gram


@triton.jit
def gram_kernel(
    X,
    base,
    grad_R,
    grad_D,
    scratch,
    d,
    r: tl.constexpr,
    CAYLEY: tl.constexpr,
    N: tl.constexpr,
    LD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute one tile of A^T B over ROWS rows of one layer, in fp64.

    A is the part of X that counts, and with ``base`` also V0. B is the part of X that counts, or
    the total gradient if there is one. The unit diagonals are excluded.

    Args:
        X: ``[L, d, r]``.
        base: ``[L, d, r]`` or None.
        grad_R, grad_D: ``[L, r, d]`` or None; both None in the forward pass.
        scratch: fp64 ``[L, parts, matrices, LD, LD]``, output; matrices is 2 with base, else 1. If
            A = B = X, the tiles below the diagonal tiles are not written.
        d, r: Sizes of X.
    """
    tiles: tl.constexpr = LD // N
    part = tl.program_id(0)
    matrix = tl.program_id(1) // (tiles * tiles)
    tile = tl.program_id(1) % (tiles * tiles)
    layer = tl.program_id(2).to(tl.int64)
    matrices: tl.constexpr = 1 if base is None else 2
    forward: tl.constexpr = grad_R is None and grad_D is None
    ti = tile // tiles
    tj = tile % tiles
    if tiles > 1 and forward and matrix == 0 and ti > tj:
        return
    X += layer * d * r
    if base is not None:
        base += layer * d * r
    if grad_R is not None:
        grad_R += layer * d * r
    if grad_D is not None:
        grad_D += layer * d * r
    i = ti * N + tl.arange(0, N)
    j = tj * N + tl.arange(0, N)
    first = part * ROWS
    last = tl.minimum(first + ROWS, d)
    B = X if forward else None
    out = scratch + ((layer * tl.num_programs(0) + part) * matrices + matrix) * LD * LD
    if base is not None and matrix == 1:
        G = gram(
            base, B, grad_R, grad_D, i, j, first, last, d, r, N, BLOCK_D, STAGES, False, CAYLEY
        )
    else:
        G = gram(X, B, grad_R, grad_D, i, j, first, last, d, r, N, BLOCK_D, STAGES, CAYLEY, CAYLEY)
    put(out, i[:, None], j[None, :], LD, G)


@triton.jit
def total_gram(
    scratch,
    layer,
    i,
    j,
    d,
    N: tl.constexpr,
    LD: tl.constexpr,
    ROWS: tl.constexpr,
    MATRIX: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return the tile (i, j) of one of the products of :func:`gram_kernel`, summed over its parts.

    i is ``[N, 1]`` and j is ``[1, N]``.
    """
    parts = tl.cdiv(d, ROWS)
    p = tl.arange(0, BLOCK_P)[:, None, None]
    at = scratch + (layer * parts * MATRICES + MATRIX) * LD * LD + (i * LD + j)[None, :, :]
    acc = tl.zeros([N, N], tl.float64)
    for start in tl.range(0, parts, BLOCK_P):
        part = start + p
        values = tl.load(at + part * (MATRICES * LD * LD), mask=part < parts, other=0.0)
        acc += tl.sum(values, axis=0)
    return acc
