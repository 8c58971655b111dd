"""Backward pass of the orthonormal maps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, orthonormal_launch
from reft_kernels.triton.small_linalg import (
    FULL,
    LOWER,
    SCRATCH,
    UPPER,
    entry,
    gram,
    multiply_square,
    product,
    put,
    signs_of,
    total_gradient,
)


@triton.jit
def build_backward_kernel(
    grad_R,
    grad_D,
    X,
    signs,
    base,
    aux,
    grad_X,
    wide,
    narrow,
    d,
    r,
    chunk,
    CAYLEY: tl.constexpr,
    N: tl.constexpr,
    LD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute dL/dX of one layer, for one split of the d rows.

    Args:
        grad_R, grad_D: ``[L, r, d]`` or None, but not both None.
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        aux: Result of the forward pass.
        grad_X: ``[L, d, r]``, output.
        wide: fp64 scratch ``[L, splits, 4, LD, LD]``, with 7 matrices if there is a base.
        narrow: fp32 scratch ``[L, splits, 3, LD, LD]``, with 4 matrices if there is a base.
        d, r: Sizes of X.
        chunk: Number of rows per split.
    """
    split = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    program = layer * tl.num_programs(0) + split
    X += layer * d * r
    if grad_R is not None:
        grad_R += layer * d * r
    if grad_D is not None:
        grad_D += layer * d * r
    if base is not None:
        base += layer * d * r
        aux += layer * 2 * r * r
        wide += program * 7 * LD * LD
        narrow += program * 4 * LD * LD
    else:
        aux += layer * r * r
        wide += program * 4 * LD * LD
        narrow += program * 3 * LD * LD
    M_bar = wide  # V^T Fbar; cayley: V^T Fbar - Fbar[:r]
    map_M = wide + LD * LD
    U = wide + 2 * LD * LD  # inner^T M_bar
    S_bar = wide + 3 * LD * LD
    B0 = wide + 4 * LD * LD  # V0^T Fbar
    H = wide + 5 * LD * LD  # T0^T B0
    J = wide + 6 * LD * LD  # H M^T
    out_F = narrow
    out_S = narrow + LD * LD
    out_P = narrow + 2 * LD * LD
    out_J = narrow + 3 * LD * LD
    offsets = tl.arange(0, N)
    # Not a constexpr, so that no phase keeps its addresses in registers for the next
    tiles = tl.cdiv(r, N)

    # V^T Fbar; with a base also V0^T Fbar. Fbar is dL/dF.
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            ri = ti * N + offsets
            rj = tj * N + offsets
            scale = signs_of(signs, layer, rj[None, :], r, base is None and not CAYLEY)
            top = total_gradient(grad_R, grad_D, ri[:, None], rj[None, :], d, r).to(tl.float64)
            sums = gram(X, None, grad_R, grad_D, ri, rj, d, r, N, BLOCK_D, CAYLEY, False)
            put(M_bar, ri[:, None], rj[None, :], LD, (sums - top if CAYLEY else sums + top) * scale)
            if base is not None:
                sums = gram(base, None, grad_R, grad_D, ri, rj, d, r, N, BLOCK_D, False, False)
                put(B0, ri[:, None], rj[None, :], LD, (sums + top) * scale)
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            M = entry(aux, i, j, r, LD, FULL)
            if CAYLEY:
                M = -2.0 * M
            else:
                M += product(aux, X, i, j, r, 0, r, N, LD, FULL, False, LOWER, True)
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
                    product(base, B0, i, j, r, 0, r, N, LD, UPPER, True, SCRATCH, False),
                )
        tl.debug_barrier()
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                change = -product(aux + r * r, H, i, j, r, 0, r, N, LD, FULL, True, SCRATCH, False)
                if CAYLEY:
                    change += entry(H, i, j, r, LD, SCRATCH) + product(
                        base, H, i, j, r, 0, r, N, LD, LOWER, False, SCRATCH, False
                    )
                put(B0, i, j, LD, entry(M_bar, i, j, r, LD, SCRATCH) + change)
                put(
                    J,
                    i,
                    j,
                    LD,
                    product(H, map_M, i, j, r, 0, r, N, LD, SCRATCH, False, SCRATCH, True),
                )
        tl.debug_barrier()
        M_bar = B0  # the result has its own storage, because M_bar was read by other tiles

    # Backward through the inverse: S_bar = -T^T (M_bar V[:r]) T^T = -(T^T M_bar) M^T
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            i = (ti * N + offsets)[:, None]
            j = (tj * N + offsets)[None, :]
            put(U, i, j, LD, product(aux, M_bar, i, j, r, 0, r, N, LD, FULL, True, SCRATCH, False))
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
                -product(U, map_M, i, j, r, 0, r, N, LD, SCRATCH, False, SCRATCH, True),
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
    for jb in tl.range(0, tl.cdiv(r, BLOCK_J)):
        j = jb * BLOCK_J + tl.arange(0, BLOCK_J)
        for start in tl.range(first, last, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            acc = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
            acc = multiply_square(acc, out_F, None, grad_R, grad_D, j, c, d, r, LD, False, BLOCK_K)
            acc = multiply_square(acc, out_S, X, None, None, j, c, d, r, LD, CAYLEY, BLOCK_K)
            if base is not None:
                acc = multiply_square(acc, out_J, base, None, None, j, c, d, r, LD, False, BLOCK_K)
            col = j[:, None]
            row = c[None, :]
            at = row * r + col
            top = tl.load(out_P + row * LD + col, mask=(row < r) & (col < r), other=0.0)
            if CAYLEY:
                acc = tl.where(row < r, top, acc)
            else:
                acc += top
            acc = tl.where(row > col, acc, 0.0)
            tl.store(grad_X + at, acc.to(grad_X.dtype.element_ty), mask=(row < last) & (col < r))


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
    layers, d, r = X.shape
    if (grad_R is None and grad_D is None) or layers == 0:
        return allocation.no_build_gradient(X)
    X, aux = X.contiguous(), aux.contiguous()
    grad_R, grad_D, signs, base = map(common.contiguous, (grad_R, grad_D, signs, base))
    grad_X = torch.empty_like(X)
    config = orthonormal_launch.build_config(layers, d, r, orthonormal_launch.processors(X.device))
    scratch = orthonormal_launch.allocate_scratch(config, X, *((4, 3) if base is None else (7, 4)))
    orthonormal_launch.launch(
        build_backward_kernel,
        config,
        X,
        is_cayley,
        grad_R,
        grad_D,
        X,
        signs,
        base,
        aux,
        grad_X,
        *scratch,
    )
    return grad_X
