"""Forward pass of the orthonormal maps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, orthonormal_launch
from reft_kernels.triton.orthonormal_gram import total_gram
from reft_kernels.triton.small_linalg import (
    LOWER,
    SCRATCH,
    UNROLLED,
    UPPER,
    entry,
    invert,
    load_square,
    product,
    put,
    save,
    signs_of,
)
from reft_kernels.triton.tall_tiles import add_product


@triton.jit
def _write(
    acc,
    m,
    M,
    X,
    y,
    Y,
    base,
    point,
    W,
    R,
    D,
    c,
    j,
    d,
    rank,
    r: tl.constexpr,
    LD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    TOP: tl.constexpr,
    CAYLEY: tl.constexpr,
):
    """Write R = acc + (L M + L0 Y)^T + point at (j, c), and D = W - R."""
    acc = add_product(acc, m, M, X, None, None, c, j, d, rank, r, LD, BLOCK_K, TOP, CAYLEY, True)
    keep = (c < d)[None, :]
    if r % BLOCK_J != 0:
        keep = keep & (j < r)[:, None]
    at = j[:, None] * d + c[None, :]
    if base is not None:
        acc = add_product(
            acc, y, Y, base, None, None, c, j, d, rank, r, LD, BLOCK_K, TOP, False, True
        )
        acc += tl.load(point + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(R + at, acc, mask=keep)
    if W is not None:
        tl.store(D + at, tl.load(W + at, mask=keep, other=0.0).to(tl.float32) - acc, mask=keep)


@triton.jit
def build_kernel(
    X,
    signs,
    base,
    point,
    W,
    R,
    D,
    aux,
    scratch,
    d,
    rank,
    chunk,
    r: tl.constexpr,
    CAYLEY: tl.constexpr,
    N: tl.constexpr,
    LD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute R, D and aux of one layer, for one split of the d rows.

    Args:
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        point: ``[L, r, d]`` or None.
        W: ``[L, r, d]`` or None.
        R: fp32 ``[L, r, d]``, output.
        D: fp32 ``[L, r, d]``, output, or None.
        aux: fp32 ``[L, 1, r, r]``, or ``[L, 2, r, r]`` with ``base``, output.
        scratch: fp64, the sums of :func:`~.orthonormal_gram.gram_kernel`, then
            ``[L, splits, 3, LD, LD]``, with 7 matrices if there is a base.
        d, rank: Sizes of X; ``r`` is the rank as a constexpr.
        chunk: Number of rows per split.
    """
    split = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    program = layer * tl.num_programs(0) + split
    matrices: tl.constexpr = 1 if base is None else 2
    sums = scratch
    scratch += tl.num_programs(1) * tl.cdiv(d, ROWS) * matrices * LD * LD
    X += layer * d * r
    aux += layer * matrices * r * r
    if base is not None:
        base += layer * d * r
        scratch += program * 7 * LD * LD
    else:
        scratch += program * 3 * LD * LD
    inner = scratch
    out_M = scratch + LD * LD
    out_P = scratch + 2 * LD * LD
    cross = scratch + 3 * LD * LD
    map_M = scratch + 4 * LD * LD
    map_Z = scratch + 5 * LD * LD
    out_Y = scratch + 6 * LD * LD
    offsets = tl.arange(0, N)
    # A loop whose count is known is unrolled, and needs more registers than a thread has
    bound = r if r <= UNROLLED else rank
    tiles = tl.cdiv(bound, N)

    # The matrix to invert, from the Gram matrix; with a base also V0^T V
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            unit = (i == j).to(tl.float64)
            # The sums are symmetric, and only tiles on and above the diagonal tiles are stored
            p = tl.minimum(i, j) if LD > N else i
            q = tl.maximum(i, j) if LD > N else j
            G = unit + total_gram(sums, layer, p, q, d, N, LD, ROWS, 0, matrices, BLOCK_P)
            below = entry(X, i, j, r, LD, LOWER)
            above = entry(X, j, i, r, LD, LOWER)
            if CAYLEY:
                G += below - above
            else:
                G = tl.where(i < j, G + above, tl.where(i == j, 0.5 * G, 0.0))
            put(inner, i, j, LD, G)
    if base is not None:
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                G = total_gram(sums, layer, i, j, d, N, LD, ROWS, 1, matrices, BLOCK_P)
                if not CAYLEY:
                    G += (
                        (i == j).to(tl.float64)
                        + entry(X, i, j, r, LD, LOWER)
                        + entry(base, j, i, r, LD, LOWER)
                    )
                put(cross, i, j, LD, G)
    tl.debug_barrier()
    invert(inner, bound, r, N, LD)

    # M and P; with a base also Z = V0^T (F - E)
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            unit = (i == j).to(tl.float64)
            M = entry(inner, i, j, r, LD, SCRATCH)
            if CAYLEY:
                M = -2.0 * M
                P = -M - unit
            else:
                M += product(inner, X, i, j, r, 0, bound, N, LD, SCRATCH, False, LOWER, True)
                P = M - unit
            scale = signs_of(signs, layer, j, r, base is None and not CAYLEY)
            if base is None:
                put(out_P, i, j, LD, P * scale)
            else:
                put(map_M, i, j, LD, M)
            put(out_M, i, j, LD, M * scale)
    tl.debug_barrier()
    if base is not None:
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                M = entry(map_M, i, j, r, LD, SCRATCH)
                top = (i == j).to(tl.float64) + entry(base, j, i, r, LD, LOWER)  # V0[:r]^T
                Z = (
                    product(cross, map_M, i, j, r, 0, bound, N, LD, SCRATCH, False, SCRATCH, False)
                    - 2.0 * top
                )
                if CAYLEY:
                    Z -= M + product(
                        base, map_M, i, j, r, 0, bound, N, LD, LOWER, True, SCRATCH, False
                    )
                put(map_Z, i, j, LD, Z)
        tl.debug_barrier()
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                scale = signs_of(signs, layer, j, r, False)
                Y = product(base, map_Z, i, j, r, 0, bound, N, LD, UPPER, False, SCRATCH, False)
                put(out_Y, i, j, LD, -Y * scale)
                unit = (i == j).to(tl.float64)
                M = entry(map_M, i, j, r, LD, SCRATCH)
                P = -M - 2.0 * unit if CAYLEY else M - 2.0 * unit
                put(out_P, i, j, LD, (P - Y) * scale)
        tl.debug_barrier()

    if split == 0:
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                save(aux, i, j, r, entry(inner, i, j, r, LD, SCRATCH))
                if base is not None:
                    save(aux + r * r, i, j, r, entry(cross, i, j, r, LD, SCRATCH))

    # R = (L M + E P - L0 Y)^T
    R += layer * d * r
    if W is not None:
        W += layer * d * r
        D += layer * d * r
    if base is not None:
        point += layer * d * r
    first = split * chunk
    last = tl.minimum(first + chunk, d)
    # Blocks that contain some of the first r rows of X are written by a loop of their own
    top = tl.minimum(tl.cdiv(r, BLOCK_C) * BLOCK_C, last)
    k = tl.arange(0, BLOCK_K)
    for jb in tl.range(0, 1 if r <= BLOCK_J else tl.cdiv(rank, BLOCK_J)):
        j = jb * BLOCK_J + tl.arange(0, BLOCK_J)
        m = None
        y = None
        if r <= BLOCK_K:
            m = load_square(out_M, k, j, r, LD)
            if base is not None:
                y = load_square(out_Y, k, j, r, LD)
        for rest in tl.static_range(2):  # the first rows, then the rest
            begin = first if rest == 0 else tl.maximum(first, top)
            end = top if rest == 0 else last
            for start in tl.range(begin, end, BLOCK_C, num_stages=1 if rest == 0 else STAGES):
                c = start + tl.arange(0, BLOCK_C)
                if rest == 0:
                    acc = tl.trans(load_square(out_P, c, j, r, LD))
                else:
                    acc = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
                _write(
                    acc,
                    m,
                    out_M,
                    X,
                    y,
                    out_Y,
                    base,
                    point,
                    W,
                    R,
                    D,
                    c,
                    j,
                    d,
                    bound,
                    r,
                    LD,
                    BLOCK_K,
                    BLOCK_J,
                    rest == 0,
                    CAYLEY,
                )


def build(
    is_cayley: bool,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    point: Tensor | None,
    W: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one of the maps; arguments as in :func:`reft_kernels.orthonormal.householder`."""
    X = X.contiguous()
    signs, base, point, W = map(common.contiguous, (signs, base, point, W))
    R, D, aux = allocation.build(X, base, W)
    if X.shape[0] > 0:
        out_D = D if W is not None else None
        orthonormal_launch.launch(
            build_kernel, X, base, None, None, is_cayley, (X, signs, base, point, W, R, out_D, aux)
        )
    return R, D, aux
