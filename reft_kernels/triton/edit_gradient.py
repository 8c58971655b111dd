"""Second launch of the edit's backward pass: dh and the gradients of the weights.

The grid is (blocks of columns, chunks of rows, weight sets). A program reads its tile of g and x,
writes dh = g + A^T dz - B^T ddelta, and sums dA, dB, dc and dp over its rows. Each element of g is
read and written by one program, so dh may overwrite g. The sums of different chunks are added in a
fixed order (:mod:`reft_kernels.triton.reduction`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.triton import common, launch, reduction


@dataclass(frozen=True)
class GradientConfig:
    """Launch parameters of ``gradient_kernel``.

    ``phases`` is the number of passes over the rows. One pass computes everything; two compute the
    sums, then dh; three compute dA, then dB, then dh. More passes keep fewer tiles in registers.
    """

    block_n: int  # rows per step
    block_d: int  # columns per program
    block_r: int  # rank, padded to a power of two of at least 16
    chunks: int  # number of programs that share the rows of one block of columns
    phases: int
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=1024)
def gradient_config(
    num_rows: int,
    d: int,
    rank: int,
    sets: int,
    dtype: torch.dtype,
    second: bool = False,
    amd: bool = False,
) -> GradientConfig:
    """Return the launch parameters of ``gradient_kernel`` for a shape.

    The tiles compile without register spills on all targets (tests/triton/aot.py). Not tuned on a
    GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        sets: S, the number of weight sets.
        dtype: dtype of the hidden states.
        second: Whether ddelta differs from dz and needs its own products.
        amd: Whether the target is an AMD GPU.
    """
    block_r = max(common.MIN_DOT, common.next_power_of_2(rank))
    columns = max(common.MIN_DOT, common.next_power_of_2(d))
    wide = dtype == torch.float32
    crowded = rank > 16 and second
    if amd or crowded and not wide:
        block_n, block_d, num_warps = 16, 32, 4
    elif rank > 32 or crowded:
        block_n, block_d, num_warps = 16, 16, 8
    elif second or rank > 16 and not wide:
        block_n, block_d, num_warps = 16, 32, 4
    else:
        block_n, block_d, num_warps = (16, 64, 8) if wide else (32, 64, 4)
    phases = 1 + (rank > 32 or second) + crowded
    num_stages = 1 if crowded and not wide else 2
    block_d = min(columns, block_d)
    # About four programs per SM of a large GPU (132 SMs), with at least four steps each
    max_chunks = max(1, 528 // (common.cdiv(d, block_d) * sets))
    chunks = max(1, min(max_chunks, common.cdiv(num_rows, 4 * block_n)))
    return GradientConfig(block_n, block_d, block_r, chunks, phases, num_warps, num_stages)


@triton.jit
def _pass_over_rows(
    acc_a,
    acc_b,
    acc_c,
    acc_q,
    grad,
    out,
    saved_input,
    rows,
    weight_ids,
    read,
    write,
    coeff,
    u,
    dz,
    ddelta,
    num_rows,
    chunks,
    d,
    r,
    grad_stride_n,
    grad_stride_d,
    out_stride_n,
    out_stride_d,
    saved_stride_n,
    saved_stride_d,
    SUBTRACT: tl.constexpr,
    SECOND: tl.constexpr,
    SUMS_A: tl.constexpr,
    SUMS_B: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Make one pass over the program's rows.

    SUMS_A adds to dA (acc_a) and dc (acc_c), SUMS_B adds to dB (acc_b) and -dp (acc_q), and WRITES
    stores dh. SECOND means that ddelta differs from dz.
    """
    FOLD: tl.constexpr = SUBTRACT and not SECOND
    NEEDS_X: tl.constexpr = (SUMS_A and (read is not None or SUBTRACT)) or (SUMS_B and SECOND)
    REBUILDS: tl.constexpr = NEEDS_X and rows is None
    chunk = tl.program_id(1)
    s = tl.program_id(2)
    i = tl.arange(0, BLOCK_R)
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = col.to(tl.int64)
    i_mask = i < r
    c_mask = col < d
    w_offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + column[None, :]
    w_mask = i_mask[:, None] & c_mask[None, :]
    steps = tl.cdiv(num_rows, BLOCK_N)
    per_chunk = tl.cdiv(steps, chunks)
    if REBUILDS or (WRITES and SECOND):
        b_tile = tl.load(write + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
    if WRITES and (read is not None or FOLD):
        a_tile = common.effective_weight(read, write, w_offsets, w_mask, FOLD)
    for step in range(chunk * per_chunk, tl.minimum(steps, (chunk + 1) * per_chunk)):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < num_rows
        row = n.to(tl.int64)
        active = inside
        if rows is not None:
            row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
            active = row >= 0
        if weight_ids is not None:
            active = active & (tl.load(weight_ids + n, mask=active, other=-1) == s)
        tile_mask = active[:, None] & c_mask[None, :]
        n64 = n.to(tl.int64)
        small = n64[:, None] * r + i[None, :]
        small_mask = active[:, None] & i_mask[None, :]
        # Small tiles are loaded again in transposed layout, because transposing a register tile
        # for a product is slow
        small_t = n64[None, :] * r + i[:, None]
        small_t_mask = active[None, :] & i_mask[:, None]
        g = tl.load(
            grad + row[:, None] * grad_stride_n + column[None, :] * grad_stride_d,
            mask=tile_mask,
            other=0.0,
        )
        if NEEDS_X:
            saved_row = row if rows is None else n64
            x = tl.load(
                saved_input
                + saved_row[:, None] * saved_stride_n
                + column[None, :] * saved_stride_d,
                mask=tile_mask,
                other=0.0,
            )
            if REBUILDS:
                # Without rows, saved_input is the output y, and x = y - B^T (coeff * u)
                used = tl.load(u + small, mask=small_mask, other=0.0)
                if coeff is not None:
                    used *= tl.load(coeff + small, mask=small_mask, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) - common.dot_small(used, b_tile, SMALL_PRECISION)).to(x.dtype)
        if SUMS_B:
            used_t = tl.load(u + small_t, mask=small_t_mask, other=0.0)
            if coeff is not None:
                used_t *= tl.load(coeff + small_t, mask=small_t_mask, other=0.0).to(tl.float32)
            acc_b += common.dot_exact_right(used_t, g, PRECISION)
            if SECOND:
                ddelta_t = tl.load(ddelta + small_t, mask=small_t_mask, other=0.0)
                acc_b -= common.dot_exact_right(ddelta_t, x, PRECISION)
                acc_q += tl.sum(tl.load(ddelta + small, mask=small_mask, other=0.0), 0)
        if SUMS_A:
            if read is not None or SUBTRACT:
                dz_t = tl.load(dz + small_t, mask=small_t_mask, other=0.0)
                acc_a += common.dot_exact_right(dz_t, x, PRECISION)
            acc_c += tl.sum(tl.load(dz + small, mask=small_mask, other=0.0), 0)
        if WRITES:
            dh = g.to(tl.float32)
            if read is not None or FOLD:
                dh += common.dot_small(
                    tl.load(dz + small, mask=small_mask, other=0.0), a_tile, SMALL_PRECISION
                )
            if SECOND:
                dh -= common.dot_small(
                    tl.load(ddelta + small, mask=small_mask, other=0.0), b_tile, SMALL_PRECISION
                )
            tl.store(
                out + row[:, None] * out_stride_n + column[None, :] * out_stride_d,
                dh.to(g.dtype),
                mask=tile_mask,
            )
    return acc_a, acc_b, acc_c, acc_q


@triton.jit(do_not_specialize=["num_rows", "num_sets", "chunks"])
def gradient_kernel(
    grad,
    out,
    saved_input,
    rows,
    weight_ids,
    read,
    write,
    coeff,
    u,
    dz,
    ddelta,
    grad_read,
    grad_read_bias,
    grad_write,
    grad_subtract_bias,
    partials,
    counters,
    num_rows,
    num_sets,
    chunks,
    d,
    r,
    grad_stride_n,
    grad_stride_d,
    out_stride_n,
    out_stride_d,
    saved_stride_n,
    saved_stride_d,
    SUBTRACT: tl.constexpr,
    LINEAR: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Compute dh and the weights' gradients for one block of columns, chunk of rows and weight set.

    ``partials`` is fp32 and holds the sums dB, dA, dc and -dp of each chunk. It and ``counters``
    are None if ONE_CHUNK is set. See :func:`launch_gradient`.
    """
    FOLD: tl.constexpr = SUBTRACT and LINEAR
    # Whether ddelta differs from dz, which needs separate products
    SECOND: tl.constexpr = SUBTRACT and not LINEAR
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    s = tl.program_id(2)
    i = tl.arange(0, BLOCK_R)
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    column = col.to(tl.int64)
    i_mask = i < r
    c_mask = col < d
    w_offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + column[None, :]
    w_mask = i_mask[:, None] & c_mask[None, :]
    acc_a = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    acc_b = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    acc_c = tl.zeros((BLOCK_R,), tl.float32)
    acc_q = tl.zeros((BLOCK_R,), tl.float32)
    for phase in tl.static_range(PHASES):
        # One pass, or sums and dh in separate passes, or dA, dB and dh in separate passes
        if (NEED_WEIGHTS and (phase < PHASES - 1 or PHASES == 1)) or (
            out is not None and phase == PHASES - 1
        ):
            acc_a, acc_b, acc_c, acc_q = _pass_over_rows(
                acc_a,
                acc_b,
                acc_c,
                acc_q,
                grad,
                out,
                saved_input,
                rows,
                weight_ids,
                read,
                write,
                coeff,
                u,
                dz,
                ddelta,
                num_rows,
                chunks,
                d,
                r,
                grad_stride_n,
                grad_stride_d,
                out_stride_n,
                out_stride_d,
                saved_stride_n,
                saved_stride_d,
                SUBTRACT,
                SECOND,
                NEED_WEIGHTS and phase == 0,
                NEED_WEIGHTS and phase == (1 if PHASES == 3 else 0),
                out is not None and phase == PHASES - 1,
                BLOCK_N,
                BLOCK_D,
                BLOCK_R,
                PRECISION,
                SMALL_PRECISION,
            )
    if NEED_WEIGHTS:
        if FOLD:
            acc_b -= acc_a
        b_offsets = tl.cast(s, tl.int64) * r + i
        first_block = i + block * BLOCK_R < r  # only block 0 stores the bias gradients
        if ONE_CHUNK:
            tl.store(grad_write + w_offsets, acc_b, mask=w_mask)
            if read is not None:
                tl.store(grad_read + w_offsets, acc_a, mask=w_mask)
            tl.store(grad_read_bias + b_offsets, acc_c, mask=first_block)
            if FOLD:
                tl.store(grad_subtract_bias + b_offsets, -acc_c, mask=first_block)
            if SECOND:
                tl.store(grad_subtract_bias + b_offsets, -acc_q, mask=first_block)
        else:
            matrix = tl.cast(num_sets, tl.int64) * r * d
            vector = tl.cast(num_sets, tl.int64) * r
            stride = 2 * matrix + 2 * vector
            chunk_partials = partials + tl.cast(chunk, tl.int64) * stride
            tl.store(chunk_partials + w_offsets, acc_b, mask=w_mask)
            tl.store(chunk_partials + matrix + w_offsets, acc_a, mask=w_mask)
            tl.store(chunk_partials + 2 * matrix + b_offsets, acc_c, mask=first_block)
            tl.store(chunk_partials + 2 * matrix + vector + b_offsets, acc_q, mask=first_block)
            counter = counters + s * tl.num_programs(0) + block
            if reduction.is_last(counter, chunks):
                total = reduction.sum_chunks(partials, w_offsets, w_mask, stride, chunks)
                tl.store(grad_write + w_offsets, total, mask=w_mask)
                if read is not None:
                    total = reduction.sum_chunks(
                        partials + matrix, w_offsets, w_mask, stride, chunks
                    )
                    tl.store(grad_read + w_offsets, total, mask=w_mask)
                bias = reduction.sum_chunks(
                    partials + 2 * matrix, b_offsets, first_block, stride, chunks
                )
                tl.store(grad_read_bias + b_offsets, bias, mask=first_block)
                if FOLD:
                    tl.store(grad_subtract_bias + b_offsets, -bias, mask=first_block)
                if SECOND:
                    bias = reduction.sum_chunks(
                        partials + 2 * matrix + vector, b_offsets, first_block, stride, chunks
                    )
                    tl.store(grad_subtract_bias + b_offsets, -bias, mask=first_block)
                tl.store(counter, 0)


@functools.lru_cache(maxsize=1024)
def _bound(
    config: GradientConfig,
    dtype: torch.dtype,
    device_type: str,
    subtract_projection: bool,
    linear: bool,
    need_weights: bool,
) -> launch.BoundKernel:
    return launch.BoundKernel(
        gradient_kernel,
        {
            "SUBTRACT": subtract_projection,
            "LINEAR": linear,
            "NEED_WEIGHTS": need_weights,
            "ONE_CHUNK": config.chunks == 1 or not need_weights,
            "PHASES": config.phases,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "PRECISION": common.dot_precision(dtype),
            "SMALL_PRECISION": common.small_precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **common.compile_options(device_type),
        },
    )


def launch_gradient(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    u: Tensor,
    dz: Tensor,
    ddelta: Tensor | None,
    weight_grads: tuple[Tensor, Tensor, Tensor, Tensor],
    subtract_projection: bool,
    linear: bool,
    need_weights: bool,
) -> None:
    """Launch :func:`gradient_kernel`.

    Args:
        grad: g ``[M, d]``, with any strides.
        out: ``[M, d]``, receives dh in the selected rows, with any strides. None to omit dh.
        saved_input: As in :func:`reft_kernels.reference.edit_backward`, with any strides.
        rows, weight_ids, read, write, coeff, u: As in the same function, contiguous.
        dz, ddelta: Results of :func:`reft_kernels.triton.edit_delta.launch_delta`.
        weight_grads: fp32 outputs dA, dc, dB and dp, shaped like the weights.
        subtract_projection: Whether the edit subtracts B x.
        linear: Whether the activation is linear.
        need_weights: Whether to compute ``weight_grads``.
    """
    num_rows, rank = dz.shape
    d = grad.shape[1]
    sets = write.shape[0] if weight_ids is not None else 1
    second = subtract_projection and not linear
    config = gradient_config(num_rows, d, rank, sets, grad.dtype, second, common.IS_AMD)
    blocks = common.cdiv(d, config.block_d)
    partials = counters = None
    if need_weights and config.chunks > 1:
        partials = grad.new_empty(
            config.chunks * 2 * (write.numel() + write.numel() // d), dtype=torch.float32
        )
        counters = reduction.counters(grad, blocks * sets)
    saved_strides = saved_input.stride() if saved_input.dim() == 2 else (0, 0)
    bound = _bound(config, grad.dtype, grad.device.type, subtract_projection, linear, need_weights)
    launch.launch(
        bound,
        (blocks, config.chunks, sets),
        (
            grad,
            out,
            saved_input,
            rows,
            weight_ids,
            read,
            write,
            coeff,
            u,
            dz,
            ddelta,
            *weight_grads,
            partials,
            counters,
        ),
        (
            num_rows,
            sets,
            config.chunks,
            d,
            rank,
            *grad.stride(),
            *(out.stride() if out is not None else (0, 0)),
            *saved_strides,
        ),
    )
