"""Forward pass of the edit: one launch for a layer.

A program processes BLOCK_N rows. It loops over the columns twice: first to compute z = A x, or
(A - B) x, and then to compute y = x + B^T (coeff * u). The second read of x is served by the cache.
With weight sets, a program repeats this for each set that occurs in its rows; each row is still
read and written for one set only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, launch


@dataclass(frozen=True)
class EditConfig:
    """Launch parameters of ``edit_kernel`` and ``delta_kernel``."""

    block_n: int  # rows per program
    block_d: int  # columns per step
    block_r: int  # rank, padded to a power of two
    use_dot: bool  # whether products use tl.dot instead of elementwise fp32 operations
    num_warps: int
    num_stages: int


@functools.lru_cache(maxsize=1024)
def edit_config(
    num_rows: int, d: int, rank: int, dtype: torch.dtype, second: bool = False, amd: bool = False
) -> EditConfig:
    """Return the launch parameters of ``edit_kernel`` for a shape.

    The tiles are the largest that compile without register spills on sm_80, sm_90, sm_100 and
    gfx942 (tests/triton/aot.py). Not tuned on a GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        second: Whether B x needs its own product (nonlinear activation, subtracted projection).
        amd: Whether the target is an AMD GPU.
    """
    block_r = common.next_power_of_2(rank)
    columns = common.next_power_of_2(d)
    if num_rows <= 1024 and rank <= 64:
        # Launch-bound: one or two rows per program distribute the rows over the SMs. The products
        # take 32 fp32 registers per thread.
        block_n = 1 if num_rows <= 264 or rank > 16 else 2
        block_d = max(16, min(columns, 4096 // (block_n * block_r)))
        return EditConfig(block_n, block_d, block_r, False, 4, 2)
    # Bandwidth-bound: 32 rows share each tile of the weights, and the 32 x 4096 bf16 inputs of 132
    # programs fit into an L2 cache of 50 MB
    block_r = max(common.MIN_DOT, block_r)
    wide = dtype == torch.float32
    if rank <= 32:
        block_n, block_d, num_warps = (
            (16, 32, 4) if second else (32, 32 if wide and rank > 16 else 64, 8 if wide else 4)
        )
    else:
        block_n, block_d, num_warps = 16, 16 if second else 32, 8
    num_warps = 4 if amd else num_warps  # 4 wavefronts have as many threads as 8 warps
    return EditConfig(
        block_n, max(common.MIN_DOT, min(columns, block_d)), block_r, True, num_warps, 2
    )


@triton.jit(do_not_specialize=["num_rows"])
def edit_kernel(
    source,
    out,
    rows,
    weight_ids,
    read,
    read_bias,
    write,
    subtract_bias,
    coeff,
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
    SUBTRACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    USE_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Compute the edit of BLOCK_N rows; arguments as in :func:`edit`, with None for absent ones."""
    FOLD: tl.constexpr = SUBTRACT and ACTIVATION == "linear"
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_R)
    inside = n < num_rows
    row = n.to(tl.int64)
    valid = inside
    if rows is not None:
        row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
        valid = row >= 0
    small = n.to(tl.int64)[:, None] * r + i[None, :]
    i_mask = i < r
    if SAVE and rows is not None:
        # Skipped entries are saved as zeros, so that they add nothing to the weights' gradients
        skipped = (inside & (row < 0))[:, None] & i_mask[None, :]
        tl.store(u_out + small, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), mask=skipped)
        if ACTIVATION != "linear":
            tl.store(z_out + small, tl.zeros((BLOCK_N, BLOCK_R), tl.float32), mask=skipped)
        skipped_rows = inside & (row < 0)
        if tl.sum(skipped_rows.to(tl.int32), 0) > 0:
            for start in range(0, d, BLOCK_D):
                col = start + tl.arange(0, BLOCK_D)
                blank = tl.zeros((BLOCK_N, BLOCK_D), saved_input.dtype.element_ty)
                tl.store(
                    saved_input + n[:, None].to(tl.int64) * d + col[None, :],
                    blank,
                    mask=skipped_rows[:, None] & (col < d)[None, :],
                )
    first_set = 0
    last_set = 0
    row_set = tl.zeros((BLOCK_N,), tl.int32)
    if weight_ids is not None:
        row_set = tl.load(weight_ids + n, mask=valid, other=0)
        first_set = tl.min(tl.where(valid, row_set, 2147483647), 0)
        last_set = tl.max(tl.where(valid, row_set, -1), 0)
    for s in range(first_set, last_set + 1):
        active = valid
        if weight_ids is not None:
            active = valid & (row_set == s)
        weight_offset = tl.cast(s, tl.int64) * r * d
        bias_offset = tl.cast(s, tl.int64) * r
        z_acc = common.product_start(BLOCK_N, BLOCK_R, BLOCK_D, USE_DOT)
        q_acc = common.product_start(BLOCK_N, BLOCK_R, BLOCK_D, USE_DOT)
        if read is not None or SUBTRACT:
            for start in range(0, d, BLOCK_D):
                col = start + tl.arange(0, BLOCK_D)
                x_offsets = (
                    row[:, None] * source_stride_n + col[None, :].to(tl.int64) * source_stride_d
                )
                x = tl.load(
                    source + x_offsets, mask=active[:, None] & (col < d)[None, :], other=0.0
                )
                w_offsets = weight_offset + i[:, None].to(tl.int64) * d + col[None, :]
                w_mask = i_mask[:, None] & (col < d)[None, :]
                if read is not None or FOLD:
                    w = common.effective_weight(read, write, w_offsets, w_mask, FOLD)
                    z_acc = common.product_step(z_acc, x, w, USE_DOT, PRECISION)
                if SUBTRACT and not FOLD:
                    w = tl.load(write + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
                    q_acc = common.product_step(q_acc, x, w, USE_DOT, PRECISION)
        z = common.product_end(z_acc, USE_DOT)
        if read_bias is not None:
            z += tl.load(read_bias + bias_offset + i, mask=i_mask, other=0.0).to(tl.float32)[
                None, :
            ]
        u = common.activate(z, ACTIVATION)
        if SUBTRACT and not FOLD:
            u -= common.product_end(q_acc, USE_DOT)
        if subtract_bias is not None:
            u -= tl.load(subtract_bias + bias_offset + i, mask=i_mask, other=0.0).to(tl.float32)[
                None, :
            ]
        small_mask = active[:, None] & i_mask[None, :]
        if SAVE:
            tl.store(u_out + small, u, mask=small_mask)
            if ACTIVATION != "linear":
                tl.store(z_out + small, z, mask=small_mask)
        if coeff is not None:
            u *= tl.load(coeff + small, mask=small_mask, other=0.0).to(tl.float32)
        u = tl.where(small_mask, u, 0.0)
        for start in range(0, d, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            x_mask = active[:, None] & (col < d)[None, :]
            column = col[None, :].to(tl.int64)
            x = tl.load(
                source + row[:, None] * source_stride_n + column * source_stride_d,
                mask=x_mask,
                other=0.0,
            )
            w_offsets = weight_offset + i[:, None].to(tl.int64) * d + col[None, :]
            w = tl.load(write + w_offsets, mask=i_mask[:, None] & (col < d)[None, :], other=0.0).to(
                tl.float32
            )
            y = x.to(tl.float32) + common.expand(u, w, USE_DOT, SMALL_PRECISION)
            if SAVE and rows is not None:
                tl.store(saved_input + n[:, None].to(tl.int64) * d + column, x, mask=x_mask)
            tl.store(
                out + row[:, None] * out_stride_n + column * out_stride_d,
                y.to(x.dtype),
                mask=x_mask,
            )


@functools.lru_cache(maxsize=1024)
def _bound(
    config: EditConfig,
    dtype: torch.dtype,
    device_type: str,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> launch.BoundKernel:
    return launch.BoundKernel(
        edit_kernel,
        {
            "SUBTRACT": subtract_projection,
            "ACTIVATION": activation,
            "SAVE": save,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "USE_DOT": config.use_dot,
            "PRECISION": common.dot_precision(dtype),
            "SMALL_PRECISION": common.small_precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **common.compile_options(device_type),
        },
    )


def edit(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    subtract_bias: Tensor | None,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`reft_kernels.reference.edit`."""
    d, rank = source.shape[1], write.shape[-2]
    num_rows = allocation.num_selected_rows(source, rows)
    saved_input, u, z = allocation.edit_saved(source, rows, write, activation, save)
    if num_rows == 0:
        return saved_input, u, z
    second = subtract_projection and activation != "linear"
    config = edit_config(num_rows, d, rank, source.dtype, second, common.IS_AMD)
    bound = _bound(config, source.dtype, source.device.type, subtract_projection, activation, save)
    launch.launch(
        bound,
        (triton.cdiv(num_rows, config.block_n),),
        (
            source,
            out,
            common.contiguous(rows),
            common.contiguous(weight_ids),
            common.contiguous(read),
            common.contiguous(read_bias),
            common.contiguous(write),
            common.contiguous(subtract_bias),
            common.contiguous(coeff),
            saved_input,
            u,
            z,
        ),
        (num_rows, d, rank, *source.stride(), *out.stride()),
    )
    return saved_input, u, z
