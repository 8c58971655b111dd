"""The general edit, backward: at most two launches for a layer.

1. ``delta_kernel`` (over rows): delta = B g, then ddelta, dz and dcoeff, all ``[N, r]``. It reads g
   once.
2. ``gradient_kernel`` (over columns, chunks of rows and sets): reads g and x, writes dh = g + A^T
   dz - B^T ddelta, and sums dA, dB, dc, dp over its rows. Every element of g is read and written by
   one program, so dh may overwrite g. Chunks are added in a fixed order by the last program to
   finish (:mod:`reft_kernels.triton.reduction`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, reduction
from reft_kernels.triton.edit import EditConfig, edit_config


@dataclass(frozen=True)
class GradientConfig:
    """Launch knobs of ``gradient_kernel``."""

    block_n: int  # rows of a step
    block_d: int  # columns of a program
    block_r: int  # rank, padded to a power of two of at least 16
    chunks: int  # programs that share the rows of one block of columns
    # passes over the rows (1; sums, then dh; dA, dB, then dh), so that fewer tiles are alive at
    # once
    phases: int
    num_warps: int
    num_stages: int


def gradient_config(
    num_rows: int,
    d: int,
    rank: int,
    sets: int,
    dtype: torch.dtype,
    second: bool = False,
    amd: bool = False,
) -> GradientConfig:
    """Launch knobs by shape: tiles that compile without spills everywhere (tests/triton/aot.py);
    speed not yet measured.
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
    # about four programs an SM of a large GPU, each with at least four steps of rows
    wanted = max(1, 528 // (triton.cdiv(d, block_d) * sets))
    chunks = max(1, min(wanted, triton.cdiv(num_rows, 4 * block_n)))
    return GradientConfig(block_n, block_d, block_r, chunks, phases, num_warps, num_stages)


def delta_config(
    num_rows: int, d: int, rank: int, dtype: torch.dtype, amd: bool = False
) -> EditConfig:
    """Launch knobs of ``delta_kernel``: the edit's, with 64 rows where 32 spill on sm_90 and
    sm_100. Speed not yet measured.
    """
    config = edit_config(num_rows, d, rank, dtype, False, amd)
    if config.use_dot and rank <= 32 and dtype != torch.float32 and not amd:
        config = replace(config, block_n=64)
    return config


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(
    grad,
    rows,
    weight_ids,
    write,
    coeff,
    u,
    z,
    dz_out,
    ddelta_out,
    dcoeff_out,
    num_rows,
    d,
    r,
    grad_stride_n,
    grad_stride_d,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    USE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_R)
    inside = n < num_rows
    row = n.to(tl.int64)
    valid = inside
    if rows is not None:
        row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
        valid = row >= 0
    row_set = tl.zeros((BLOCK_N,), tl.int32)
    first_set = 0
    last_set = 0
    if weight_ids is not None:
        row_set = tl.load(weight_ids + n, mask=valid, other=0)
        first_set = tl.min(tl.where(valid, row_set, 2147483647), 0)
        last_set = tl.max(tl.where(valid, row_set, -1), 0)
    delta = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for s in range(first_set, last_set + 1):
        mine = valid
        if weight_ids is not None:
            mine = valid & (row_set == s)
        acc = common.product_start(BLOCK_N, BLOCK_R, BLOCK_D, USE_DOT)
        for start in range(0, d, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            g_offsets = row[:, None] * grad_stride_n + col[None, :].to(tl.int64) * grad_stride_d
            g = tl.load(grad + g_offsets, mask=mine[:, None] & (col < d)[None, :], other=0.0)
            w_offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + col[None, :]
            w = tl.load(
                write + w_offsets, mask=(i < r)[:, None] & (col < d)[None, :], other=0.0
            ).to(tl.float32)
            acc = common.product_step(acc, g, w, USE_DOT, PRECISION)
        # rows of other sets, and skipped ones, were loaded as zeros
        delta += common.product_end(acc, USE_DOT)
    small = n.to(tl.int64)[:, None] * r + i[None, :]
    inside_small = inside[:, None] & (i < r)[None, :]
    valid_small = valid[:, None] & (i < r)[None, :]
    ddelta = delta
    if coeff is not None:
        c = tl.load(coeff + small, mask=valid_small, other=0.0).to(tl.float32)
        ddelta = c * delta
        used = tl.load(u + small, mask=valid_small, other=0.0)
        tl.store(dcoeff_out + small, used * delta, mask=inside_small)
    dz = ddelta
    if ACTIVATION != "linear":
        saved = tl.load(z + small, mask=valid_small, other=0.0)
        dz = ddelta * common.activation_derivative(saved, ACTIVATION)
        if ddelta_out is not None:
            tl.store(ddelta_out + small, ddelta, mask=inside_small)
    tl.store(dz_out + small, dz, mask=inside_small)


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
    kept_stride_n,
    kept_stride_d,
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
    """One pass over a program's rows: add to dA and dc (SUMS_A), to dB and dp (SUMS_B), write dh
    (WRITES), or all at once.
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
        mine = inside
        if rows is not None:
            row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
            mine = row >= 0
        if weight_ids is not None:
            mine = mine & (tl.load(weight_ids + n, mask=mine, other=-1) == s)
        tile_mask = mine[:, None] & c_mask[None, :]
        n64 = n.to(tl.int64)
        small = n64[:, None] * r + i[None, :]
        small_mask = mine[:, None] & i_mask[None, :]
        # loaded a second time transposed: an accumulator or register tile is never transposed into
        # a product
        small_t = n64[None, :] * r + i[:, None]
        small_t_mask = mine[None, :] & i_mask[:, None]
        g = tl.load(
            grad + row[:, None] * grad_stride_n + column[None, :] * grad_stride_d,
            mask=tile_mask,
            other=0.0,
        )
        if NEEDS_X:
            kept_row = row if rows is None else n64
            x = tl.load(
                saved_input + kept_row[:, None] * kept_stride_n + column[None, :] * kept_stride_d,
                mask=tile_mask,
                other=0.0,
            )
            if REBUILDS:
                # over all rows the output was saved_input: x = y - B^T (coeff * u)
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
    kept_stride_n,
    kept_stride_d,
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
    FOLD: tl.constexpr = SUBTRACT and LINEAR
    SECOND: tl.constexpr = (
        SUBTRACT and not LINEAR
    )  # ddelta differs from dz and has a product of its own
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
    if PHASES == 1:
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
            kept_stride_n,
            kept_stride_d,
            SUBTRACT,
            SECOND,
            NEED_WEIGHTS,
            NEED_WEIGHTS,
            out is not None,
            BLOCK_N,
            BLOCK_D,
            BLOCK_R,
            PRECISION,
            SMALL_PRECISION,
        )
    else:
        if NEED_WEIGHTS:
            # dA and dB in passes of their own, or together
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
                kept_stride_n,
                kept_stride_d,
                SUBTRACT,
                SECOND,
                True,
                PHASES == 2,
                False,
                BLOCK_N,
                BLOCK_D,
                BLOCK_R,
                PRECISION,
                SMALL_PRECISION,
            )
        if NEED_WEIGHTS and PHASES == 3:
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
                kept_stride_n,
                kept_stride_d,
                SUBTRACT,
                SECOND,
                False,
                True,
                False,
                BLOCK_N,
                BLOCK_D,
                BLOCK_R,
                PRECISION,
                SMALL_PRECISION,
            )
        if out is not None:
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
                kept_stride_n,
                kept_stride_d,
                SUBTRACT,
                SECOND,
                False,
                False,
                True,
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
        first_block = (
            i + block * BLOCK_R < r
        )  # biases are summed by every block, stored by the first
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
            mine_partials = partials + tl.cast(chunk, tl.int64) * stride
            tl.store(mine_partials + w_offsets, acc_b, mask=w_mask)
            tl.store(mine_partials + matrix + w_offsets, acc_a, mask=w_mask)
            tl.store(mine_partials + 2 * matrix + b_offsets, acc_c, mask=first_block)
            tl.store(mine_partials + 2 * matrix + vector + b_offsets, acc_q, mask=first_block)
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


def edit_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    u: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The contract of :func:`reft_kernels.reference.edit_backward`, in two launches (one where
    only dcoeff is wanted).
    """
    d, rank = grad.shape[1], write.shape[-2]
    num_rows = allocation.num_selected_rows(grad, rows)
    sets = write.shape[0] if weight_ids is not None else 1
    linear = activation == "linear"
    second = subtract_projection and not linear

    grads = allocation.edit_gradients(
        grad, rows, read, write, coeff, subtract_projection, need_weights
    )
    grad_read, grad_bias, grad_write, grad_subtract_bias, grad_coeff = grads
    if num_rows == 0:
        for empty_sum in grads:
            empty_sum.zero_()
        return grads
    rows, weight_ids, read, write, coeff = (
        common.contiguous(t) for t in (rows, weight_ids, read, write, coeff)
    )
    u, z = common.contiguous(u), common.contiguous(z)
    dz = grad.new_empty((num_rows, rank), dtype=torch.float32)
    ddelta = grad.new_empty((num_rows, rank), dtype=torch.float32) if second else None
    row_config = delta_config(num_rows, d, rank, grad.dtype, common.IS_AMD)
    config = gradient_config(num_rows, d, rank, sets, grad.dtype, second, common.IS_AMD)
    with common.device_guard(grad):
        delta_kernel[(triton.cdiv(num_rows, row_config.block_n),)](
            grad,
            rows,
            weight_ids,
            write,
            coeff,
            u,
            z,
            dz,
            ddelta,
            grad_coeff,
            num_rows,
            d,
            rank,
            *grad.stride(),
            ACTIVATION=activation,
            BLOCK_N=row_config.block_n,
            BLOCK_D=row_config.block_d,
            BLOCK_R=row_config.block_r,
            USE_DOT=row_config.use_dot,
            PRECISION=common.dot_precision(grad.dtype),
            num_warps=row_config.num_warps,
            num_stages=row_config.num_stages,
            **common.compile_options(grad),
        )
        if out is None and not need_weights:
            return grads
        blocks = triton.cdiv(d, config.block_d)
        partials = counters = None
        if need_weights and config.chunks > 1:
            partials = grad.new_empty(
                config.chunks * 2 * (write.numel() + write.numel() // d), dtype=torch.float32
            )
            counters = reduction.counters(grad, blocks * sets)
        kept_strides = saved_input.stride() if saved_input.dim() == 2 else (0, 0)
        gradient_kernel[(blocks, config.chunks, sets)](
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
            grad_bias,
            grad_write,
            grad_subtract_bias,
            partials,
            counters,
            num_rows,
            sets,
            config.chunks,
            d,
            rank,
            *grad.stride(),
            *(out.stride() if out is not None else (0, 0)),
            *kept_strides,
            SUBTRACT=subtract_projection,
            LINEAR=linear,
            NEED_WEIGHTS=need_weights,
            ONE_CHUNK=config.chunks == 1 or not need_weights,
            PHASES=config.phases,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            BLOCK_R=config.block_r,
            PRECISION=common.dot_precision(grad.dtype),
            SMALL_PRECISION=common.small_precision(grad.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **common.compile_options(grad),
        )
    return grads
