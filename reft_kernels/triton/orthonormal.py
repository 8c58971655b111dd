"""Orthonormal R for all layers in one launch: the Householder and Cayley maps of
:mod:`reft_kernels.orthonormal`.

The maps, signs and base points are defined there. With E the first r columns of the identity and L
= tril(X, -1) (cayley: K = [0; X[r:]]), both are written here without the unit diagonal of V = E +
L, which keeps it exact:

    F = V M + E N = L M + E P            householder: P = M - I;  cayley: L = K, M = -2C, P = 2C - I
    V^T V = I + L1 + L1^T + L^T L        L1 = L[:r]

Grid: (splits of d, layers). Every program of a layer reduces the Gram matrix over all of d and does
the r x r algebra itself,
in fp64 and in its own scratch memory, then writes its own part of d: no program waits for another,
and two runs are bit-identical. What one phase writes to scratch the next reads, behind
``tl.debug_barrier()``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common
from reft_kernels.triton.small_linalg import (
    FULL,
    LOWER,
    SCRATCH,
    UPPER,
    entry,
    gram,
    invert,
    multiply_square,
    product,
    put,
    save,
    total_gradient,
)


@triton.jit
def _signs_of(signs, layer, j, r, NEGATE: tl.constexpr):
    """The signs of the columns j in fp64 (None: all 1), negated where the map is the product of
    reflectors, which is -F.
    """
    scale = tl.full(j.shape, -1.0 if NEGATE else 1.0, tl.float64)
    if signs is not None:
        scale *= tl.load(signs + layer * r + j, mask=j < r, other=1.0).to(tl.float64)
    return scale


@triton.jit
def _build_kernel(
    X,
    signs,
    base,
    point,
    W,  # [L, d, r], [L, r], [L, d, r], [L, r, d], [L, r, d]; all but X may be None
    R,
    D,
    aux,  # [L, r, d], [L, r, d] or None, [L, 1 or 2, r, r]; fp32
    wide,
    narrow,  # scratch: fp64 [L, splits, 1 or 4, LD, LD], fp32 [L, splits, 2 or 3, LD, LD]
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
    split = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    program = layer * tl.num_programs(0) + split
    X += layer * d * r
    if base is not None:
        base += layer * d * r
        aux += layer * 2 * r * r
        wide += program * 4 * LD * LD
        narrow += program * 3 * LD * LD
    else:
        aux += layer * r * r
        wide += program * LD * LD
        narrow += program * 2 * LD * LD
    inner = wide
    cross = wide + LD * LD
    map_M = wide + 2 * LD * LD
    map_Z = wide + 3 * LD * LD
    out_M = narrow
    out_P = narrow + LD * LD
    out_Y = narrow + 2 * LD * LD
    offsets = tl.arange(0, N)
    tiles = tl.cdiv(
        r, N
    )  # not a constant: each phase then computes its addresses anew and keeps none in registers

    # Gram matrices -> the matrix to invert, and V0^T V
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            ri = ti * N + offsets
            rj = tj * N + offsets
            i = ri[:, None]
            j = rj[None, :]
            unit = (i == j).to(tl.float64)
            G = unit + gram(X, X, None, None, ri, rj, d, r, N, BLOCK_D, CAYLEY, CAYLEY)
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
                ri = ti * N + offsets
                rj = tj * N + offsets
                i = ri[:, None]
                j = rj[None, :]
                G = gram(base, X, None, None, ri, rj, d, r, N, BLOCK_D, False, CAYLEY)
                if not CAYLEY:
                    G += (
                        (i == j).to(tl.float64)
                        + entry(X, i, j, r, LD, LOWER)
                        + entry(base, j, i, r, LD, LOWER)
                    )
                put(cross, i, j, LD, G)
    tl.debug_barrier()
    invert(inner, r, N, LD)

    # M, P and, with a base, Z = V0^T (F - E)
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
                M += product(inner, X, i, j, r, 0, r, N, LD, SCRATCH, False, LOWER, True)
                P = M - unit
            scale = _signs_of(signs, layer, j, r, base is None and not CAYLEY)
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
                    product(cross, map_M, i, j, r, 0, r, N, LD, SCRATCH, False, SCRATCH, False)
                    - 2.0 * top
                )
                if CAYLEY:
                    Z -= M + product(base, map_M, i, j, r, 0, r, N, LD, LOWER, True, SCRATCH, False)
                put(map_Z, i, j, LD, Z)
        tl.debug_barrier()
        for ti in tl.range(0, tiles):
            for tj in tl.range(0, tiles):
                i = (ti * N + offsets)[:, None]
                j = (tj * N + offsets)[None, :]
                scale = _signs_of(signs, layer, j, r, False)
                Y = product(base, map_Z, i, j, r, 0, r, N, LD, UPPER, False, SCRATCH, False)
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
    for jb in tl.range(0, tl.cdiv(r, BLOCK_J)):
        j = jb * BLOCK_J + tl.arange(0, BLOCK_J)
        for start in tl.range(first, last, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            acc = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
            acc = multiply_square(acc, out_M, X, None, None, j, c, d, r, LD, CAYLEY, BLOCK_K)
            if base is not None:
                acc = multiply_square(acc, out_Y, base, None, None, j, c, d, r, LD, False, BLOCK_K)
            row = j[:, None]
            col = c[None, :]
            acc += tl.load(out_P + col * LD + row, mask=(col < r) & (row < r), other=0.0)
            keep = (col < last) & (row < r)
            at = row * d + col
            if base is not None:
                acc += tl.load(point + at, mask=keep, other=0.0).to(tl.float32)
            tl.store(R + at, acc, mask=keep)
            if W is not None:
                tl.store(
                    D + at, tl.load(W + at, mask=keep, other=0.0).to(tl.float32) - acc, mask=keep
                )


@triton.jit
def _build_backward_kernel(
    grad_R,
    grad_D,
    X,
    signs,
    base,
    aux,  # [L, r, d] twice (not both None), [L, d, r], [L, r], [L, d, r], [L, 1 or 2, r, r]
    grad_X,  # [L, d, r]
    wide,
    narrow,  # scratch: fp64 [L, splits, 4 or 7, LD, LD], fp32 [L, splits, 3 or 4, LD, LD]
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
    tiles = tl.cdiv(
        r, N
    )  # not a constant: each phase then computes its addresses anew and keeps none in registers

    # V^T Fbar and, with a base, V0^T Fbar
    for ti in tl.range(0, tiles):
        for tj in tl.range(0, tiles):
            ri = ti * N + offsets
            rj = tj * N + offsets
            scale = _signs_of(signs, layer, rj[None, :], r, base is None and not CAYLEY)
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
                out_F, j, i, LD, M * _signs_of(signs, layer, j, r, base is None and not CAYLEY)
            )  # M^T
    tl.debug_barrier()

    # through the base's reflectors: Fbar - V0 H
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
        M_bar = B0  # its own tiles were still being read

    # through the inverse: S_bar = -T^T (M_bar V[:r]) T^T = -(T^T M_bar) M^T
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


@dataclass(frozen=True)
class BuildConfig:
    """Launch knobs of both kernels."""

    tile: int  # N: r x r matrices are worked on in N x N tiles
    padded: int  # LD: r rounded up to whole tiles
    block_d: int  # rows of V summed at once in fp32
    block_k: int  # rank columns contracted at once when writing
    block_j: int  # rank rows written at once
    block_c: int  # columns of R (rows of grad_X) written at once
    splits: int  # programs a layer
    chunk: int  # rows of V that one program writes, a multiple of block_c
    num_warps: int
    num_stages: int

    def constexprs(self) -> dict[str, int]:
        return {
            "N": self.tile,
            "LD": self.padded,
            "BLOCK_D": self.block_d,
            "BLOCK_K": self.block_k,
            "BLOCK_J": self.block_j,
            "BLOCK_C": self.block_c,
        }


_MAX_TILE = 32  # compiled: an fp64 tile of 64 x 64 spills
_BLOCK_D = {
    4: 256,
    8: 64,
    16: 32,
    32: 32,
}  # compiled: 4, 8 keep 16 sums a thread; 16, 32 are limited as block_k is
_MAX_SPLITS = (
    8  # not measured: every split repeats the Gram sum, so past 8 there is little left to share out
)
_MAX_SCRATCH = 64 << 20  # bytes, not measured: large r takes fewer programs rather than more memory


def build_config(layers: int, d: int, r: int, processors: int) -> BuildConfig:
    """The launch for ``layers`` matrices ``[d, r]`` on a device of ``processors``
    multiprocessors; pure host arithmetic.
    """
    tile = min(_MAX_TILE, max(4, triton.next_power_of_2(r)))
    padded = triton.cdiv(r, tile) * tile
    block_c = 64  # not measured
    chunks = triton.cdiv(d, block_c)
    scratch = 72 * padded**2 * max(layers, 1)  # a split's bytes: 7 fp64 and 4 fp32 matrices at most
    splits = max(1, min(processors // max(layers, 1), _MAX_SPLITS, chunks, _MAX_SCRATCH // scratch))
    chunk = triton.cdiv(chunks, splits) * block_c
    return BuildConfig(
        tile=tile,
        padded=padded,
        block_d=_BLOCK_D[tile],
        # the least that tl.dot takes; without tensor cores it holds that many values of each row in
        # registers
        block_k=16,
        block_j=max(16, tile),
        block_c=block_c,
        splits=triton.cdiv(d, chunk),
        chunk=chunk,
        # not measured: with one program a multiprocessor its own warps must hide the latency
        num_warps=8,
        num_stages=1,  # compiled: prefetching takes the registers that the sums need
    )


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: one layer still runs more than one split
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, config: BuildConfig, X: Tensor, is_cayley: bool, *args) -> None:
    layers, d, r = X.shape
    with common.device_guard(X):
        kernel[(config.splits, layers)](
            *args,
            d,
            r,
            config.chunk,
            CAYLEY=is_cayley,
            **config.constexprs(),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common.compile_options(X),
        )


def _scratch(config: BuildConfig, X: Tensor, wide: int, narrow: int) -> tuple[Tensor, Tensor]:
    """``wide`` fp64 and ``narrow`` fp32 matrices ``[LD, LD]`` for each program."""
    size = X.shape[0] * config.splits * config.padded**2
    return X.new_empty(wide * size, dtype=torch.float64), X.new_empty(
        narrow * size, dtype=torch.float32
    )


def _build(is_cayley: bool, X: Tensor, signs, base, point, W):
    layers, d, r = X.shape
    X, signs, base, point, W = map(common.contiguous, (X, signs, base, point, W))
    R, D, aux = allocation.build(X, base, W)
    if layers > 0:
        config = build_config(layers, d, r, _processors(X.device))
        scratch = _scratch(config, X, *((1, 2) if base is None else (4, 3)))
        out_D = D if W is not None else None
        _launch(
            _build_kernel, config, X, is_cayley, X, signs, base, point, W, R, out_D, aux, *scratch
        )
    return R, D, aux


def _build_backward(is_cayley: bool, grad_R, grad_D, X: Tensor, signs, base, aux: Tensor) -> Tensor:
    layers, d, r = X.shape
    if (grad_R is None and grad_D is None) or layers == 0:
        return allocation.no_build_gradient(X)
    grad_R, grad_D, X, signs, base, aux = map(
        common.contiguous, (grad_R, grad_D, X, signs, base, aux)
    )
    grad_X = torch.empty_like(X)
    config = build_config(layers, d, r, _processors(X.device))
    scratch = _scratch(config, X, *((4, 3) if base is None else (7, 4)))
    _launch(
        _build_backward_kernel,
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


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and T (with a base also
    V0^T V) as ``aux``; fp32.
    """
    return _build(False, X, signs, base, point, W)


def householder_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]`` in X's dtype, zero on and above the diagonal; ``grad_D`` counts
    against R (D = W - R).
    """
    return _build_backward(False, grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and C (with a base also
    V0^T V) as ``aux``; fp32.
    """
    return _build(True, X, signs, base, point, W)


def cayley_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]`` in X's dtype, zero on and above the diagonal of X[:r]; ``grad_D``
    counts against R (D = W - R).
    """
    return _build_backward(True, grad_R, grad_D, X, signs, base, aux)


def aot_specs(d: int, r: int) -> Iterator[tuple]:
    """``(jit_function, signature, constexprs, num_warps, num_stages)`` of each kernel, with and
    without base and W, in fp32.

    CUDA targets are compiled with ``common.CUDA_OPTIONS``, as the launch does.
    """
    config = build_config(32, d, r, 132)
    for is_cayley in (False, True):
        for has_base in (False, True):
            for has_W in (False, True):
                for kernel, of_base, of_W in (
                    (_build_kernel, ("signs", "base", "point"), ("W", "D")),
                    (_build_backward_kernel, ("signs", "base"), ("grad_D",)),
                ):
                    absent = (() if has_base else of_base) + (() if has_W else of_W)
                    constexprs = {
                        "CAYLEY": is_cayley,
                        **config.constexprs(),
                        **dict.fromkeys(absent),
                    }
                    if r == 1:  # as the launch does for an argument that is 1
                        constexprs["r"] = 1
                    types = {
                        "d": "i32",
                        "r": "i32",
                        "chunk": "i32",
                        "wide": "*fp64",
                        **dict.fromkeys(constexprs, "constexpr"),
                    }
                    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
                    yield kernel, signature, constexprs, config.num_warps, config.num_stages
