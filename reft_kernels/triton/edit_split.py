"""Edit of few rows at large ranks: two launches whose programs read a part of the weights.

A program of :mod:`reft_kernels.triton.edit` reads A and B whole, for d = 4096 and r = 64 in bf16
1 MiB, which takes one multiprocessor longer than a second launch. Here the grid has a second axis,
parts of the columns:

1. ``project_kernel`` computes A x, and B x where it is needed, over each part alone: partial sums
   ``[parts, N, R]`` in fp32.
2. ``write_kernel`` adds the partial sums in the order of the parts, computes u, and writes
   y = x + B^T (coeff * u) in its part of the columns.

Neither needs atomics, and the result does not depend on when a program runs. The backward pass
computes delta = B g with the first kernel, too (:mod:`reft_kernels.triton.edit_delta`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.triton import common, edit_tile, launch

WEIGHT_BYTES = 512 * 1024  # of the matrices that one launch reads; with fewer it takes less time
MOST_ROWS = 1024
RANKS = range(9, 65)
_BUFFERS = 92 * 1024  # GPUs of compute capability 8.6 and 8.9 have 99 KiB for a program


@dataclass(frozen=True)
class SplitConfig:
    """Launch parameters of ``project_kernel`` and ``write_kernel``."""

    block_n: int  # rows per program
    block_d: int  # columns per step, divided among the slices
    block_r: int  # rank, padded to a power of two
    width: int  # columns per program, a multiple of block_d
    parts: int  # programs that share the columns of a row
    slices: int  # parts of a step's columns, one for each warp
    stages: int  # steps whose loads are in flight, plus one


@functools.lru_cache(maxsize=1024)
def split_config(
    num_rows: int,
    d: int,
    rank: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    matrices: int = 2,
    amd: bool = False,
) -> SplitConfig | None:
    """Return the launch parameters for a shape, or None where one launch takes less time.

    They do not depend on the number of rows, so that a change of it compiles nothing. The tiles
    compile without register spills on sm_80, sm_90 and sm_100. Not tuned on a GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        weight_dtype: dtype of the matrices.
        matrices: Matrices that a program of one launch would read.
        amd: Whether the target is an AMD GPU.
    """
    if amd or num_rows > MOST_ROWS or rank not in RANKS:
        return None
    if matrices * rank * d * weight_dtype.itemsize < WEIGHT_BYTES:
        return None
    block_r = max(common.MIN_DOT, common.next_power_of_2(rank))
    # The terms of fp32 and fp16 products take more registers
    block_n, slices = (32 if dtype == torch.bfloat16 else 16), 8
    block_d = slices * common.MIN_DOT
    # At most 8 parts: each program of the second launch reads the partial sums of all parts
    width = max(512, common.next_power_of_2(d) // 8)
    column = block_n * dtype.itemsize + block_r * weight_dtype.itemsize
    in_flight = min(_BUFFERS // (block_d * column), width // block_d)
    return SplitConfig(
        block_n,
        block_d,
        block_r,
        width,
        common.cdiv(d, width),
        slices,
        1 + max(1, min(4, in_flight)),
    )


@triton.jit(do_not_specialize=["num_rows", "partial_groups"])
def project_kernel(
    source,
    rows,
    weight_ids,
    read,
    write,
    partials,
    num_rows,
    partial_groups,
    d,
    r,
    source_stride_n,
    source_stride_d,
    FOLD: tl.constexpr,
    SECOND: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute A x, or (A - B) x, of BLOCK_N rows over WIDTH columns, and with SECOND B x.

    The partial sums ``[parts, num_rows, BLOCK_R]``, those of B x after those of A x, start at word
    16 * partial_groups of ``partials``. See :func:`launch_project`.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_rows
    row, valid, row_set, first_set, last_set = edit_tile.find_rows(
        rows, weight_ids, n, inside, BLOCK_N
    )
    begin = tl.program_id(1) * WIDTH
    part = begin + edit_tile.columns(SLICES, BLOCK_D // SLICES)
    extent = tl.minimum(WIDTH, d - begin)
    x_rows = source + row[None, :, None] * source_stride_n
    i = tl.arange(0, BLOCK_R)
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    target = partials + tl.cast(partial_groups, tl.int64) * 16 + tl.program_id(1) * size
    target += n.to(tl.int64)[:, None] * BLOCK_R + i[None, :]
    for s in range(first_set, last_set + 1):
        active = valid
        stored = inside
        if weight_ids is not None:
            active = valid & (row_set == s)
            stored = inside & (row_set == s)
        x_mask = active[None, :, None]
        w_rows = (tl.cast(s, tl.int64) * r + i[None, None, :]) * d
        w_mask = (i < r)[None, None, :]
        if read is not None or FOLD:
            z = edit_tile.project(
                x_rows,
                x_mask,
                source_stride_d,
                read,
                write,
                w_rows,
                w_mask,
                d,
                part,
                extent,
                FOLD,
                EVEN,
                BLOCK_N,
                BLOCK_R,
                SLICES,
                STAGES,
                PRECISION,
            )
            tl.store(target, z, mask=stored[:, None])
        if SECOND:
            q = edit_tile.project(
                x_rows,
                x_mask,
                source_stride_d,
                write,
                write,
                w_rows,
                w_mask,
                d,
                part,
                extent,
                False,
                EVEN,
                BLOCK_N,
                BLOCK_R,
                SLICES,
                STAGES,
                PRECISION,
            )
            after = tl.num_programs(1) * size if read is not None else 0
            tl.store(target + after, q, mask=stored[:, None])


@triton.jit
def sum_parts(
    partials, n, inside, size, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Return the sum ``[N, R]`` of the partial sums of the entries n, in the order of the parts."""
    source = partials + n.to(tl.int64)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(source + part * size, mask=inside[:, None], other=0.0)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def write_kernel(
    source,
    out,
    rows,
    weight_ids,
    read_bias,
    write,
    subtract_bias,
    coeff,
    partials,
    saved_input,
    u_out,
    z_out,
    num_rows,
    d,
    r,
    source_stride_n,
    source_stride_d,
    out_stride_n,
    out_stride_d,
    PROJECTS: tl.constexpr,
    SUBTRACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Compute WIDTH columns of the edit of BLOCK_N rows; arguments as in ``edit_kernel``.

    PROJECTS means that ``partials`` starts with the sums of A x, or of (A - B) x.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_rows
    row, valid, row_set, first_set, last_set = edit_tile.find_rows(
        rows, weight_ids, n, inside, BLOCK_N
    )
    begin = tl.program_id(1) * WIDTH
    part = begin + edit_tile.columns(SLICES, BLOCK_D // SLICES)
    extent = tl.minimum(WIDTH, d - begin)
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    first_part = begin + tl.zeros((BLOCK_N,), tl.int32) == 0  # saves u and z
    z = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    q = z
    if PROJECTS:
        z = sum_parts(partials, n, inside, size, PARTS, BLOCK_N, BLOCK_R)
    if SUBTRACT and ACTIVATION != "linear":
        after = PARTS * size if PROJECTS else 0
        q = sum_parts(partials + after, n, inside, size, PARTS, BLOCK_N, BLOCK_R)
    for s in range(first_set, last_set + 1):
        active = valid
        stored = inside
        if weight_ids is not None:
            active = valid & (row_set == s)
            stored = inside & (row_set == s)
        weights = tl.cast(s, tl.int64) * r
        u = edit_tile.subspace(
            z,
            q,
            read_bias,
            subtract_bias,
            coeff,
            u_out,
            z_out,
            active,
            stored & first_part,
            weights,
            r,
            SUBTRACT,
            ACTIVATION,
            SAVE,
            BLOCK_N,
            BLOCK_R,
        )
        edit_tile.add_edit(
            source + row[None, :, None] * source_stride_n,
            out + row[None, :, None] * out_stride_n,
            saved_input + n[None, :, None].to(tl.int64) * d,
            active[None, :, None],
            stored[None, :, None],
            source_stride_d,
            out_stride_d,
            write,
            weights,
            u,
            d,
            r,
            part,
            extent,
            SAVE and rows is not None,
            EVEN,
            BLOCK_N,
            BLOCK_R,
            SLICES,
            STAGES,
            SMALL_PRECISION,
        )


def partial_words(config: SplitConfig, num_rows: int, sums: int = 1) -> int:
    """Return the number of fp32 words of the partial sums of ``sums`` projections."""
    return sums * config.parts * num_rows * config.block_r


@functools.lru_cache(maxsize=1024)
def _bound_project(
    config: SplitConfig, d: int, dtype: torch.dtype, device_type: str, fold: bool, second: bool
) -> launch.BoundKernel:
    return launch.BoundKernel(
        project_kernel,
        {
            "FOLD": fold,
            "SECOND": second,
            "EVEN": d % config.block_d == 0,
            "WIDTH": config.width,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "SLICES": config.slices,
            "STAGES": config.stages,
            "PRECISION": common.dot_precision(dtype),
        },
        {
            "num_warps": config.slices,
            "num_stages": config.stages,
            **common.compile_options(device_type),
        },
    )


@functools.lru_cache(maxsize=1024)
def _bound_write(
    config: SplitConfig,
    d: int,
    dtype: torch.dtype,
    device_type: str,
    projects: bool,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> launch.BoundKernel:
    return launch.BoundKernel(
        write_kernel,
        {
            "PROJECTS": projects,
            "SUBTRACT": subtract_projection,
            "ACTIVATION": activation,
            "SAVE": save,
            "EVEN": d % config.block_d == 0,
            "WIDTH": config.width,
            "PARTS": config.parts,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "SLICES": config.slices,
            "STAGES": config.stages,
            "SMALL_PRECISION": common.small_precision(dtype),
        },
        {
            "num_warps": config.slices,
            "num_stages": config.stages,
            **common.compile_options(device_type),
        },
    )


def launch_project(
    config: SplitConfig,
    source: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    partials: Tensor,
    partial_groups: int,
    num_rows: int,
    fold: bool,
    second: bool,
) -> None:
    """Launch :func:`project_kernel` with contiguous arguments; ``source`` has any strides.

    Args:
        config: Result of :func:`split_config`.
        source: Hidden states or their gradients, ``[M, d]``.
        rows, weight_ids, read, write: As in :func:`reft_kernels.reference.edit`.
        partials: fp32, receives :func:`partial_words` words after 16 * ``partial_groups`` others.
        partial_groups: Groups of 16 words before the sums.
        num_rows: N.
        fold: Whether to project on A - B; without ``read`` on -B.
        second: Whether to project on B, too.
    """
    d, rank = source.shape[1], write.shape[-2]
    launch.launch(
        _bound_project(config, d, source.dtype, source.device.type, fold, second),
        (common.cdiv(num_rows, config.block_n), config.parts),
        (source, rows, weight_ids, read, write, partials),
        (num_rows, partial_groups, d, rank, *source.stride()),
    )


def launch_edit(
    config: SplitConfig,
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    subtract_bias: Tensor | None,
    coeff: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor],
    num_rows: int,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> None:
    """Launch both kernels with contiguous arguments; ``source`` and ``out`` have any strides.

    Args:
        config: Result of :func:`split_config`.
        source, out, rows, weight_ids, read, read_bias, write, subtract_bias, coeff,
            subtract_projection, activation, save: As in :func:`reft_kernels.reference.edit`.
        saved: Its results, allocated.
        num_rows: N, not zero.
    """
    d, rank = source.shape[1], write.shape[-2]
    second = subtract_projection and activation != "linear"
    fold = subtract_projection and not second
    projects = read is not None or fold
    partials = source.new_empty(
        partial_words(config, num_rows, projects + second), dtype=torch.float32
    )
    launch_project(
        config, source, rows, weight_ids, read, write, partials, 0, num_rows, fold, second
    )
    launch.launch(
        _bound_write(
            config,
            d,
            source.dtype,
            source.device.type,
            projects,
            subtract_projection,
            activation,
            save,
        ),
        (common.cdiv(num_rows, config.block_n), config.parts),
        (source, out, rows, weight_ids, read_bias, write, subtract_bias, coeff, partials, *saved),
        (num_rows, d, rank, *source.stride(), *out.stride()),
    )
