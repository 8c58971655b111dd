"""Second launch of the edit's backward pass: dh and the gradients of the weights.

The grid is (blocks of columns, chunks of rows, weight sets). A program reads its tiles of g and x,
writes dh = g + A^T dz - B^T ddelta, and sums dA, dB, dc and dp over its rows. Each element of g is
read and written by one program, so dh may overwrite g. Chunks take turns from the last rows to the
first, because the first launch read the last rows last and an L2 cache still holds part of them.

Without rows, x is not saved. It is y - B^T used with used = coeff * u, and it is rebuilt in each
tile. For half precision and r <= 8 instead

    dz^T x = dz^T y - (dz^T used) B

where dz^T used is ``[r, r]``: y's rounding is then the only error of dtype size, as it is after x
is rebuilt. For fp32 the difference of the two sums would cancel for edits of several times h, and
for larger r the products with ``[r, r]`` sums take more registers than the rebuilt tile.

Bytes: dz of a row depends on the whole row of g, so one kernel would have to keep ``[rows, d]``
tiles of g and x and the sums ``[2, r, d]`` on chip. At d = 4096, r = 8 in bf16 the sums take
256 KiB, all the registers of an SM; adding them to memory for each tile of 16 rows would move
512 KiB for 384 KiB of states. Splitting d over a cluster of programs needs sums over distributed
shared memory, which Triton does not have. So g is read twice: four states are moved, less what the
L2 cache keeps of g. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.triton import common, edit_sum, edit_tile, factors, launch, reduction

FEW_ROWS = 1024
_SHARED_PARTS = 128 * 1024  # of programs with two parts of the ranks and two buffers in flight
_BUFFERS = 92 * 1024  # GPUs of compute capability 8.6 and 8.9 have 99 KiB for a program


@dataclass(frozen=True)
class GradientConfig:
    """Launch parameters of ``gradient_kernel``."""

    block_n: int  # rows per step
    block_d: int  # columns per program
    block_r: int
    chunks: int  # number of programs that share the rows of one block of columns
    num_warps: int
    num_stages: int  # buffers of the loads
    parts: int  # parts of the ranks, for each of which the weights' gradients are summed


@functools.lru_cache(maxsize=1024)
def gradient_config(
    num_rows: int,
    d: int,
    rank: int,
    sets: int,
    dtype: torch.dtype,
    second: bool = False,
    rows_selected: bool = False,
    amd: bool = False,
    shared: int = 227 * 1024,
) -> GradientConfig:
    """Return the launch parameters of ``gradient_kernel`` for a shape.

    The weights' gradients of 64 ranks are two products of 32 rows: products of 64 rows go through
    tensor memory on sm_100, where Triton puts four barriers around each. With 64 columns and 8
    warps each warp has its own columns, so that rebuilt rows of x stay in it.

    The tiles compile without register spills on all targets (tests/triton/aot.py). Few rows get
    narrow blocks of columns and one chunk, many rows wide blocks. Not tuned on a GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        sets: S, the number of weight sets.
        dtype: dtype of the hidden states.
        second: Whether ddelta differs from dz and needs its own products.
        rows_selected: Whether the call has ``rows``.
        amd: Whether the target is an AMD GPU.
        shared: Bytes of shared memory that a program can use.
    """
    block_r = factors.padded_rank(rank, dtype)
    columns = max(common.MIN_DOT, common.next_power_of_2(d))
    few = num_rows <= FEW_ROWS
    wide = dtype == torch.float32
    # Larger ranks, and the sums of ddelta and x in fp32, would spill registers
    parts = 2 if block_r == 64 and not amd and not (wide and second) else 1
    if parts > 1:
        block_n, block_d, num_warps = (16 if wide else 32), 64, 8
        num_stages = 3 if shared >= _SHARED_PARTS else 2
    elif wide:
        block_n, block_d, num_warps, num_stages = 16, 64, 4, 3
        if block_r > 32 or second or (block_r > 16 and amd):
            block_d, num_warps, num_stages = 16 if block_r > 32 else 32, 8, 2
        elif block_r > 16:
            block_d = 32
    elif amd:
        block_n, block_d, num_warps, num_stages = 32, 32, 4, 2
    elif block_r > 32 or block_r > 16 and second:
        block_n, block_d, num_warps, num_stages = 32, 32, 4, 3
    else:
        # 8 elements of a tile for each thread: dh is exchanged between the warps at once
        block_n, block_d, num_warps, num_stages = 32, 64, 8, 4
    if few and block_d > 32 and parts == 1:
        # The narrower tile leaves registers for more rows
        block_n, block_d = (64 if block_r == 8 and not second else block_n), 32
        num_warps = 4
    if rows_selected and not amd and not wide:
        # Row numbers are loaded a step before the rows
        loads = 5 if second else 3  # of factors, whose rows have block_r words
        words = loads * block_r
        if parts > 1 and dtype == torch.bfloat16:
            words -= (2 if second else 1) * block_r // 2  # low terms that dh does not take
        step = block_n * (2 * block_d * dtype.itemsize + words * 4)
        num_stages = 1 + max(2, min(4, _BUFFERS // step))
    block_d = min(columns, block_d)
    # About four programs per SM of a large GPU (132 SMs)
    max_chunks = max(1, 528 // (common.cdiv(d, block_d) * sets))
    chunks = max(1, min(max_chunks, num_rows // FEW_ROWS))
    return GradientConfig(block_n, block_d, block_r, chunks, num_warps, num_stages, parts)


@triton.jit(do_not_specialize=["num_rows", "counter_groups", "num_sets", "chunks"])
def gradient_kernel(
    grad,
    out,
    saved_input,
    rows,
    weight_ids,
    read,
    write,
    workspace,
    grad_read,
    grad_read_bias,
    grad_write,
    grad_subtract_bias,
    num_rows,
    counter_groups,
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
    SECOND: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    SUMS_CHUNKS: tl.constexpr,
    TERMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute dh and the weights' gradients for one block of columns, chunk of rows and weight set.

    With SUMS_CHUNKS, the last chunk to finish adds the sums of all chunks. SECOND means that
    ddelta differs from dz. See :func:`launch_gradient`.
    """
    FOLD: tl.constexpr = SUBTRACT and not SECOND
    NEEDS_X: tl.constexpr = NEED_WEIGHTS and (read is not None or SUBTRACT)
    REBUILDS: tl.constexpr = NEEDS_X and rows is None and TERMS != 1
    CORRECTS: tl.constexpr = NEEDS_X and rows is None and TERMS == 1
    EXACT: tl.constexpr = grad.dtype.element_ty != tl.bfloat16
    WIDTH: tl.constexpr = 16 if TERMS == 1 else BLOCK_R
    RANKS: tl.constexpr = BLOCK_R // PARTS
    SUM_ROWS: tl.constexpr = 16 if TERMS == 1 else RANKS
    SUMS: tl.constexpr = BLOCK_N if TERMS == 0 else 16
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    s = tl.program_id(2)
    # With TERMS = 1, the rows of high and of low terms meet the same weights
    i = tl.arange(0, WIDTH) % BLOCK_R
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    column = col.to(tl.int64)
    c_mask = col < d
    w_offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + column[None, :]
    w_mask = (i < r)[:, None] & c_mask[None, :]
    dz = workspace + counter_groups * 16
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    used = dz + size
    minus_ddelta = dz + 2 * size
    if REBUILDS or (out is not None and SECOND):
        b = tl.load(write + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
        b_high, b_low = factors.weight_terms(b, TERMS)
    if out is not None and (read is not None or FOLD):
        a = edit_tile.read_weight(read, write, w_offsets, w_mask, FOLD).to(tl.float32)
        a_high, a_low = factors.weight_terms(a, TERMS)
    acc_a = factors.zeros(SUM_ROWS, BLOCK_D, PARTS)
    acc_b = factors.zeros(SUM_ROWS, BLOCK_D, PARTS)
    acc_c = factors.zeros(SUM_ROWS, SUMS, PARTS)
    acc_q = factors.zeros(SUM_ROWS, SUMS, PARTS)
    acc_a_used = tl.zeros((WIDTH, WIDTH), tl.float32)
    acc_b_used = tl.zeros((WIDTH, WIDTH), tl.float32)
    steps = tl.cdiv(num_rows, BLOCK_N)
    for turn in tl.range(0, tl.cdiv(steps - chunk, chunks), num_stages=STAGES):
        first = tl.cast(steps - 1 - chunk - turn * chunks, tl.int64) * BLOCK_N
        n = (steps - 1 - chunk - turn * chunks) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < num_rows
        row = n.to(tl.int64)
        active = inside
        present = inside  # factors of skipped rows are zero
        if rows is not None:
            row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
            active = row >= 0
        if weight_ids is not None:
            active = active & (tl.load(weight_ids + n, mask=active, other=-1) == s)
            present = active
        mask = active[:, None] & c_mask[None, :]
        g = tl.load(
            grad + row[:, None] * grad_stride_n + column[None, :] * grad_stride_d,
            mask=mask,
            other=0.0,
        )
        if NEED_WEIGHTS:
            dz_t = factors.load_parts(dz, first, present, PARTS, BLOCK_R, TERMS)
            used_t = factors.load_parts(used, first, present, PARTS, BLOCK_R, TERMS)
            if SECOND:
                dd_t = factors.load_parts(minus_ddelta, first, present, PARTS, BLOCK_R, TERMS)
        if NEEDS_X:
            saved_row = row if rows is None else n.to(tl.int64)
            x = tl.load(
                saved_input
                + saved_row[:, None] * saved_stride_n
                + column[None, :] * saved_stride_d,
                mask=mask,
                other=0.0,
            )
            if REBUILDS or CORRECTS:
                row_high, row_low = factors.load(used, first, present, BLOCK_R, TERMS)
            if REBUILDS:
                edit = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
                edit = factors.expand(
                    edit, row_high, row_low, b_high, b_low, True, TERMS, PRECISION
                )
                x = (x.to(tl.float32) - edit).to(x.dtype)
            acc_a = factors.outers(acc_a, dz_t, x, PARTS, TERMS, PRECISION)
            if CORRECTS:
                acc_a_used = factors.gram(
                    acc_a_used, dz_t[0], dz_t[1], row_high, row_low, TERMS, PRECISION
                )
        if NEED_WEIGHTS:
            acc_c = factors.row_sums(acc_c, dz_t, PARTS, BLOCK_N, TERMS, PRECISION)
            acc_b = factors.outers(acc_b, used_t, g, PARTS, TERMS, PRECISION)
            if SECOND:
                acc_q = factors.row_sums(acc_q, dd_t, PARTS, BLOCK_N, TERMS, PRECISION)
                acc_b = factors.outers(acc_b, dd_t, x, PARTS, TERMS, PRECISION)
                if CORRECTS:
                    acc_b_used = factors.gram(
                        acc_b_used, dd_t[0], dd_t[1], row_high, row_low, TERMS, PRECISION
                    )
        if out is not None:
            dh = g.to(tl.float32)
            if read is not None or FOLD:
                high, low = factors.load(dz, first, present, BLOCK_R, TERMS)
                dh = factors.expand(dh, high, low, a_high, a_low, EXACT, TERMS, PRECISION)
            if SECOND:
                high, low = factors.load(minus_ddelta, first, present, BLOCK_R, TERMS)
                dh = factors.expand(dh, high, low, b_high, b_low, EXACT, TERMS, PRECISION)
            tl.store(
                out + row[:, None] * out_stride_n + column[None, :] * out_stride_d,
                dh.to(g.dtype),
                mask=mask,
            )
    if NEED_WEIGHTS:
        # With terms the columns of acc_c are equal, and so are those of acc_q
        COPIES: tl.constexpr = 1 if TERMS == 0 else 16
        if CORRECTS:
            # x = y - B^T used: the products with y are corrected by those with B^T used
            b = tl.load(write + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
            b_high, b_low = factors.weight_terms(b, TERMS)
        for part in tl.static_range(PARTS):
            part_a = acc_a[part]
            part_b = acc_b[part]
            if CORRECTS:
                part_a = factors.subtract_product(part_a, acc_a_used, b_high, b_low, PRECISION)
                if SECOND:
                    part_b = factors.subtract_product(part_b, acc_b_used, b_high, b_low, PRECISION)
            sum_a = factors.fold(part_a, BLOCK_D, RANKS, TERMS)
            sum_b = factors.fold(part_b, BLOCK_D, RANKS, TERMS)
            sum_c = tl.sum(factors.fold(acc_c[part], SUMS, RANKS, TERMS), 1) / COPIES
            if FOLD:
                sum_b -= sum_a
            subtract = -sum_c
            if SECOND:
                subtract = tl.sum(factors.fold(acc_q[part], SUMS, RANKS, TERMS), 1) / COPIES
            i = part * RANKS + tl.arange(0, RANKS)
            offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + column[None, :]
            mask = (i < r)[:, None] & c_mask[None, :]
            b_offsets = tl.cast(s, tl.int64) * r + i
            b_mask = i + block * BLOCK_R < r  # only block 0 stores the bias gradients
            if chunks == 1:
                tl.store(grad_write + offsets, sum_b, mask=mask)
                if read is not None:
                    tl.store(grad_read + offsets, sum_a, mask=mask)
                tl.store(grad_read_bias + b_offsets, sum_c, mask=b_mask)
                if SUBTRACT:
                    tl.store(grad_subtract_bias + b_offsets, subtract, mask=b_mask)
            else:
                matrix = reduction.padded(tl.cast(num_sets, tl.int64) * r * d)
                vector = reduction.padded(tl.cast(num_sets, tl.int64) * r)
                own = dz + (3 if SECOND else 2) * size + chunk * (2 * matrix + 2 * vector)
                tl.store(own + offsets, sum_b, mask=mask)
                tl.store(own + matrix + offsets, sum_a, mask=mask)
                tl.store(own + 2 * matrix + b_offsets, sum_c, mask=b_mask)
                tl.store(own + 2 * matrix + vector + b_offsets, subtract, mask=b_mask)
        if SUMS_CHUNKS:
            counter = workspace.to(tl.pointer_type(tl.int32)) + s * tl.num_programs(0) + block
            if chunks > 1:
                partials = dz + (3 if SECOND else 2) * size
                if reduction.is_last(counter, chunks):
                    edit_sum.sum_partials(
                        partials,
                        grad_read,
                        grad_read_bias,
                        grad_write,
                        grad_subtract_bias,
                        num_sets,
                        chunks,
                        d,
                        r,
                        block,
                        s,
                        read is not None,
                        SUBTRACT,
                        BLOCK_D,
                        BLOCK_R,
                    )


def workspace_words(num_rows: int, write: Tensor, config: GradientConfig, second: bool) -> int:
    """Return the number of fp32 words that the backward pass needs besides its results."""
    rank, d = write.shape[-2:]
    words = (3 if second else 2) * num_rows * config.block_r
    if config.chunks > 1:
        matrix, vector = (reduction.round_up(n) for n in (write.numel(), write.numel() // d))
        words += 16 * counter_groups(write, config) + config.chunks * 2 * (matrix + vector)
    return words


def counter_groups(write: Tensor, config: GradientConfig) -> int:
    """Return the number of groups of 16 counters, one for each program's tile of the weights."""
    if config.chunks == 1:
        return 0
    sets = write.numel() // (write.shape[-1] * write.shape[-2])
    return common.cdiv(common.cdiv(write.shape[-1], config.block_d) * sets, 16)


@functools.lru_cache(maxsize=1024)
def _bound(
    config: GradientConfig,
    rank: int,
    dtype: torch.dtype,
    device_type: str,
    subtract_projection: bool,
    second: bool,
    need_weights: bool,
) -> launch.BoundKernel:
    return launch.BoundKernel(
        gradient_kernel,
        {
            "SUBTRACT": subtract_projection,
            "SECOND": second,
            "NEED_WEIGHTS": need_weights,
            "SUMS_CHUNKS": not common.IS_AMD,
            "TERMS": factors.terms(rank, dtype),
            "PARTS": config.parts,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "STAGES": config.num_stages,
            "PRECISION": factors.precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            # With parts ptxas spills registers if it is told that it may use all
            **(common.compile_options(device_type) if config.parts == 1 else {}),
        },
    )


@functools.lru_cache(maxsize=1024)
def _bound_sum(
    config: GradientConfig, reads: bool, subtract_projection: bool, second: bool
) -> launch.BoundKernel:
    return launch.BoundKernel(
        edit_sum.sum_kernel,
        {
            "READS": reads,
            "SUBTRACT": subtract_projection,
            "SECOND": second,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
        },
        {"num_warps": config.num_warps},
    )


def launch_gradient(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    workspace: Tensor,
    weight_grads: tuple[Tensor, Tensor, Tensor, Tensor],
    config: GradientConfig,
    subtract_projection: bool,
    second: bool,
    need_weights: bool,
) -> None:
    """Launch :func:`gradient_kernel`.

    On AMD GPUs, :func:`reft_kernels.triton.edit_sum.sum_kernel` follows if there are chunks.

    Args:
        grad: g ``[M, d]``, with any strides.
        out: ``[M, d]``, receives dh in the selected rows, with any strides. None to omit dh.
        saved_input: As in :func:`reft_kernels.reference.edit_backward`, with any strides.
        rows, weight_ids, read, write: As in the same function, contiguous.
        workspace: Counters and factors from :func:`reft_kernels.triton.edit_delta.launch_delta`,
            with space for the partial sums: :func:`workspace_words` in all.
        weight_grads: fp32 outputs dA, dc, dB and dp, shaped like the weights.
        config: Result of :func:`gradient_config`.
        subtract_projection: Whether the edit subtracts B x.
        second: Whether it does and the activation is not linear.
        need_weights: Whether to compute ``weight_grads``.
    """
    d, rank = grad.shape[1], write.shape[-2]
    num_rows = grad.shape[0] if rows is None else rows.shape[0]
    sets = write.shape[0] if weight_ids is not None else 1
    groups = counter_groups(write, config)
    blocks = common.cdiv(d, config.block_d)
    saved_strides = saved_input.stride() if saved_input.dim() == 2 else (0, 0)
    launch.launch(
        _bound(
            config, rank, grad.dtype, grad.device.type, subtract_projection, second, need_weights
        ),
        (blocks, config.chunks, sets),
        (grad, out, saved_input, rows, weight_ids, read, write, workspace, *weight_grads),
        (
            num_rows,
            groups,
            sets,
            config.chunks,
            d,
            rank,
            *grad.stride(),
            *(out.stride() if out is not None else (0, 0)),
            *saved_strides,
        ),
    )
    if need_weights and common.IS_AMD and config.chunks > 1:
        launch.launch(
            _bound_sum(config, read is not None, subtract_projection, second),
            (blocks, sets),
            (workspace, *weight_grads),
            (num_rows, groups, sets, config.chunks, d, rank),
        )
