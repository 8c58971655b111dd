"""Backward pass of the orthonormal maps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, orthonormal_launch
from reft_kernels.triton.orthonormal_gram import total_gram
from reft_kernels.triton.small_linalg import (
    FULL,
    LOWER,
    SCRATCH,
    UNROLLED,
    UPPER,
    entry,
    load_square,
    product,
    put,
    signs_of,
)
from reft_kernels.triton.tall_tiles import add_product, total_gradient


@triton.jit
def _sum(
    f,
    F,
    s,
    S,
    y,
    J,
    X,
    base,
    grad_R,
    grad_D,
    c,
    j,
    d,
    rank,
    r: tl.constexpr,
    LD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TOP: tl.constexpr,
    CAYLEY: tl.constexpr,
):
    """Return Fbar F + L S + L0 J at (c, j)."""
    acc = tl.zeros([BLOCK_C, BLOCK_J], tl.float32)
    acc = add_product(
        acc, f, F, None, grad_R, grad_D, c, j, d, rank, r, LD, BLOCK_K, TOP, False, False
    )
    acc = add_product(acc, s, S, X, None, None, c, j, d, rank, r, LD, BLOCK_K, TOP, CAYLEY, False)
    if base is not None:
        acc = add_product(
            acc, y, J, base, None, None, c, j, d, rank, r, LD, BLOCK_K, TOP, False, False
        )
    return acc


@triton.jit
def _store(grad_X, value, c, j, d, r: tl.constexpr, BLOCK_J: tl.constexpr):
    keep = (c < d)[:, None]
    if r % BLOCK_J != 0:
        keep = keep & (j < r)[None, :]
    at = c[:, None] * r + j[None, :]
    tl.store(grad_X + at, value.to(grad_X.dtype.element_ty), mask=keep)


@triton.jit
def build_backward_kernel(
    grad_R,
    grad_D,
    X,
    signs,
    base,
    aux,
    grad_X,
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
    """Compute dL/dX of one layer, for one split of the d rows.

    Args:
        grad_R, grad_D: ``[L, r, d]`` or None, but not both None.
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        aux: Result of the forward pass.
        grad_X: ``[L, d, r]``, output.
        scratch: fp64, the sums of :func:`~.orthonormal_gram.gram_kernel`, then
            ``[L, splits, 7, LD, LD]``, with 11 matrices if there is a base.
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
    if grad_R is not None:
        grad_R += layer * d * r
    if grad_D is not None:
        grad_D += layer * d * r
    if base is not None:
        base += layer * d * r
        scratch += program * 11 * LD * LD
    else:
        scratch += program * 7 * LD * LD
    M_bar = scratch  # V^T Fbar; cayley: V^T Fbar - Fbar[:r]
    map_M = scratch + LD * LD
    U = scratch + 2 * LD * LD  # inner^T M_bar
    S_bar = scratch + 3 * LD * LD
    out_F = scratch + 4 * LD * LD
    out_S = scratch + 5 * LD * LD
    out_P = scratch + 6 * LD * LD
    B0 = scratch + 7 * LD * LD  # V0^T Fbar
    H = scratch + 8 * LD * LD  # T0^T B0
    J = scratch + 9 * LD * LD  # H M^T
    out_J = scratch + 10 * LD * LD
    offsets = tl.arange(0, N)
    # A loop whose count is known is unrolled, and needs more registers than a thread has
    bound = r if r <= UNROLLED else rank
    tiles = tl.cdiv(bound, N)

    # V^T Fbar; with a base also V0^T Fbar. Fbar is dL/dF.
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            scale = signs_of(signs, layer, j, r, base is None and not CAYLEY)
            top = total_gradient(grad_R, grad_D, i, j, d, r, N).to(tl.float64)
            # Sums without the unit diagonals of V and V0
            total = total_gram(sums, layer, i, j, d, N, LD, ROWS, 0, matrices, BLOCK_P)
            put(M_bar, i, j, LD, (total - top if CAYLEY else total + top) * scale)
            if base is not None:
                total = total_gram(sums, layer, i, j, d, N, LD, ROWS, 1, matrices, BLOCK_P)
                put(B0, i, j, LD, (total + top) * scale)
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            M = entry(aux, i, j, r, LD, FULL)
            if CAYLEY:
                M = -2.0 * M
            else:
                M += product(aux, X, i, j, r, 0, bound, N, LD, FULL, False, LOWER, True)
            put(map_M, i, j, LD, M)
            put(
                out_F, j, i, LD, M * signs_of(signs, layer, j, r, base is None and not CAYLEY)
            )  # M^T
    tl.debug_barrier()

    # Backward through the base's reflectors: Fbar - V0 H
    if base is not None:
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                put(
                    H,
                    i,
                    j,
                    LD,
                    product(base, B0, i, j, r, 0, bound, N, LD, UPPER, True, SCRATCH, False),
                )
        tl.debug_barrier()
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                change = -product(
                    aux + r * r, H, i, j, r, 0, bound, N, LD, FULL, True, SCRATCH, False
                )
                if CAYLEY:
                    change += entry(H, i, j, r, LD, SCRATCH) + product(
                        base, H, i, j, r, 0, bound, N, LD, LOWER, False, SCRATCH, False
                    )
                put(B0, i, j, LD, entry(M_bar, i, j, r, LD, SCRATCH) + change)
                put(
                    J,
                    i,
                    j,
                    LD,
                    product(H, map_M, i, j, r, 0, bound, N, LD, SCRATCH, False, SCRATCH, True),
                )
        tl.debug_barrier()
        M_bar = B0  # the result has its own storage, because M_bar was read by other tiles

    # Backward through the inverse: S_bar = -T^T (M_bar V[:r]) T^T = -(T^T M_bar) M^T
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            put(
                U,
                i,
                j,
                LD,
                product(aux, M_bar, i, j, r, 0, bound, N, LD, FULL, True, SCRATCH, False),
            )
    tl.debug_barrier()
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            put(
                S_bar,
                i,
                j,
                LD,
                -product(U, map_M, i, j, r, 0, bound, N, LD, SCRATCH, False, SCRATCH, True),
            )
    tl.debug_barrier()
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            here = entry(S_bar, i, j, r, LD, SCRATCH)
            there = entry(S_bar, j, i, r, LD, SCRATCH)
            if CAYLEY:
                sym = here + there
                top = here - there
            else:
                sym = tl.where(i <= j, here, there)
                top = sym + entry(U, j, i, r, LD, SCRATCH)
            put(out_S, i, j, LD, sym)
            if base is not None:
                back = entry(J, i, j, r, LD, SCRATCH)
                put(out_J, i, j, LD, -back)
                if not CAYLEY:
                    top -= back
            put(out_P, i, j, LD, top)
    tl.debug_barrier()

    # grad_X = tril(Fbar M^T - V0 J + V (G_bar + G_bar^T) + top, -1), transposed
    grad_X += layer * d * r
    first = split * chunk
    last = tl.minimum(first + chunk, d)
    # Blocks that contain some of the first r rows of X are written by a loop of their own
    top = tl.minimum(tl.cdiv(r, BLOCK_C) * BLOCK_C, last)
    k = tl.arange(0, BLOCK_K)
    for jb in tl.range(0, 1 if r <= BLOCK_J else tl.cdiv(rank, BLOCK_J)):
        j = jb * BLOCK_J + tl.arange(0, BLOCK_J)
        f = None
        s = None
        y = None
        if r <= BLOCK_K:
            f = load_square(out_F, k, j, r, LD)
            s = load_square(out_S, k, j, r, LD)
            if base is not None:
                y = load_square(out_J, k, j, r, LD)
        for rest in tl.static_range(2):  # the first rows, then the rest
            begin = first if rest == 0 else tl.maximum(first, top)
            end = top if rest == 0 else last
            for start in tl.range(begin, end, BLOCK_C, num_stages=1 if rest == 0 else STAGES):
                c = start + tl.arange(0, BLOCK_C)
                acc = _sum(
                    f,
                    out_F,
                    s,
                    out_S,
                    y,
                    out_J,
                    X,
                    base,
                    grad_R,
                    grad_D,
                    c,
                    j,
                    d,
                    bound,
                    r,
                    LD,
                    BLOCK_K,
                    BLOCK_J,
                    BLOCK_C,
                    rest == 0,
                    CAYLEY,
                )
                if rest == 0:
                    row = c[:, None]
                    value = load_square(out_P, c, j, r, LD)
                    acc = tl.where(row < r, value, acc) if CAYLEY else acc + value
                    acc = tl.where(row > j[None, :], acc, 0.0)
                _store(grad_X, acc, c, j, d, r, BLOCK_J)


def build_backward(
    is_cayley: bool,
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    """Compute dL/dX; arguments as in :func:`reft_kernels.orthonormal.householder_backward`."""
    if (grad_R is None and grad_D is None) or X.shape[0] == 0:
        return allocation.no_build_gradient(X)
    X, aux = X.contiguous(), aux.contiguous()
    grad_R, grad_D, signs, base = map(common.contiguous, (grad_R, grad_D, signs, base))
    grad_X = torch.empty_like(X)
    orthonormal_launch.launch(
        build_backward_kernel,
        X,
        base,
        grad_R,
        grad_D,
        is_cayley,
        (grad_R, grad_D, X, signs, base, aux, grad_X),
    )
    return grad_X
