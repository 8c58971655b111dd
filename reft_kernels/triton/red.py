"""RED, y = scale * x + bias: one launch for the forward pass, at most two for the backward pass.

The backward pass of few rows is one launch. With more rows, chunks of them are summed by different
programs, and a second launch adds the partial sums.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, launch, reduction


@dataclass(frozen=True)
class RedConfig:
    """Launch parameters of both kernels."""

    block_n: int  # rows per program (forward) or step (backward)
    block_d: int  # columns per program
    chunks: int  # backward: number of programs that share the rows of one block of columns
    num_warps: int


FEW_ROWS = 1024


@functools.lru_cache(maxsize=1024)
def red_config(num_rows: int, d: int, sets: int) -> RedConfig:
    """Return the launch parameters for a shape: tiles of 4096 elements.

    Few rows get narrow blocks of columns and one chunk. There are two tiles for a shape of the
    weights, so that a change of the number of rows compiles at most two kernels. Not tuned on a GPU
    yet.
    """
    block_d = min(common.next_power_of_2(d), 64 if num_rows <= FEW_ROWS else 256)
    block_n = min(4096 // block_d, 64)
    max_chunks = max(1, 528 // (common.cdiv(d, block_d) * sets))
    chunks = max(1, min(max_chunks, num_rows // FEW_ROWS))
    return RedConfig(block_n, block_d, chunks, 4)


@triton.jit(do_not_specialize=["num_rows"])
def red_kernel(
    source,
    out,
    rows,
    weight_ids,
    scale,
    bias,
    saved_input,
    num_rows,
    d,
    source_stride_n,
    source_stride_d,
    out_stride_n,
    out_stride_d,
    SAVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute RED for BLOCK_N rows and BLOCK_D columns; arguments as in :func:`red`."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = n.to(tl.int64)
    active = n < num_rows
    if rows is not None:
        row = tl.load(rows + n, mask=active, other=-1).to(tl.int64)
        active = row >= 0
    mask = active[:, None] & (col < d)[None, :]
    column = col[None, :].to(tl.int64)
    x = tl.load(
        source + row[:, None] * source_stride_n + column * source_stride_d, mask=mask, other=0.0
    )
    w_offsets = column
    if weight_ids is not None:
        w_offsets = tl.load(weight_ids + n, mask=active, other=0).to(tl.int64)[:, None] * d + column
    w_mask = (col < d)[None, :]
    a = tl.load(scale + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
    b = tl.load(bias + w_offsets, mask=w_mask, other=0.0).to(tl.float32)
    if SAVE:
        # Skipped entries were loaded as zeros and are saved as zeros
        tl.store(
            saved_input + n[:, None].to(tl.int64) * d + column,
            x,
            mask=(n < num_rows)[:, None] & (col < d)[None, :],
        )
    y = a * x.to(tl.float32) + b
    tl.store(out + row[:, None] * out_stride_n + column * out_stride_d, y.to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_sets", "chunks"])
def red_backward_kernel(
    grad,
    out,
    saved_input,
    rows,
    weight_ids,
    scale,
    grad_scale,
    grad_bias,
    partials,
    num_rows,
    num_sets,
    chunks,
    d,
    grad_stride_n,
    grad_stride_d,
    out_stride_n,
    out_stride_d,
    saved_stride_n,
    saved_stride_d,
    NEED_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute dh, dscale and dbias for one block of columns, chunk of rows and weight set.

    ``partials`` is fp32 ``[chunks, 2, S, d]``; it is not used if there is one chunk.
    """
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    s = tl.program_id(2)
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    column = col[None, :].to(tl.int64)
    c_mask = col < d
    w_offsets = tl.cast(s, tl.int64) * d + col
    a = tl.load(scale + w_offsets, mask=c_mask, other=0.0).to(tl.float32)
    acc_scale = tl.zeros((BLOCK_D,), tl.float32)
    acc_bias = tl.zeros((BLOCK_D,), tl.float32)
    steps = tl.cdiv(num_rows, BLOCK_N)
    per_chunk = tl.cdiv(steps, chunks)
    for step in range(chunk * per_chunk, tl.minimum(steps, (chunk + 1) * per_chunk)):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        row = n.to(tl.int64)
        active = n < num_rows
        if rows is not None:
            row = tl.load(rows + n, mask=active, other=-1).to(tl.int64)
            active = row >= 0
        if weight_ids is not None:
            active = active & (tl.load(weight_ids + n, mask=active, other=-1) == s)
        mask = active[:, None] & c_mask[None, :]
        g_raw = tl.load(
            grad + row[:, None] * grad_stride_n + column * grad_stride_d, mask=mask, other=0.0
        )
        g = g_raw.to(tl.float32)
        if NEED_WEIGHTS:
            x_row = row if rows is None else n.to(tl.int64)
            x = tl.load(
                saved_input + x_row[:, None] * saved_stride_n + column * saved_stride_d,
                mask=mask,
                other=0.0,
            )
            acc_scale += tl.sum(g * x.to(tl.float32), 0)
            acc_bias += tl.sum(g, 0)
        if out is not None:
            dh = (a[None, :] * g).to(g_raw.dtype)
            tl.store(out + row[:, None] * out_stride_n + column * out_stride_d, dh, mask=mask)
    if NEED_WEIGHTS:
        if chunks == 1:
            tl.store(grad_scale + w_offsets, acc_scale, mask=c_mask)
            tl.store(grad_bias + w_offsets, acc_bias, mask=c_mask)
        else:
            size = tl.cast(num_sets, tl.int64) * d
            chunk_partials = partials + tl.cast(chunk, tl.int64) * 2 * size
            tl.store(chunk_partials + w_offsets, acc_scale, mask=c_mask)
            tl.store(chunk_partials + size + w_offsets, acc_bias, mask=c_mask)


@triton.jit(do_not_specialize=["size", "chunks"])
def red_sum_kernel(grad_scale, grad_bias, partials, size, chunks, BLOCK: tl.constexpr):
    """Add the partial sums of :func:`red_backward_kernel`'s chunks, ``[chunks, 2, size]``."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    stride = 2 * tl.cast(size, tl.int64)
    total = reduction.sum_chunks(partials, offsets, mask, stride, chunks)
    tl.store(grad_scale + offsets, total, mask=mask)
    total = reduction.sum_chunks(partials + size, offsets, mask, stride, chunks)
    tl.store(grad_bias + offsets, total, mask=mask)


@functools.lru_cache(maxsize=1024)
def _bound_forward(config: RedConfig, save: bool, device_type: str) -> launch.BoundKernel:
    constants = {"SAVE": save, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    options = {"num_warps": config.num_warps, **common.compile_options(device_type)}
    return launch.BoundKernel(red_kernel, constants, options)


@functools.lru_cache(maxsize=1024)
def _bound_backward(config: RedConfig, need_weights: bool, device_type: str) -> launch.BoundKernel:
    constants = {"NEED_WEIGHTS": need_weights, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d}
    options = {"num_warps": config.num_warps, **common.compile_options(device_type)}
    return launch.BoundKernel(red_backward_kernel, constants, options)


@functools.lru_cache(maxsize=1)
def _bound_sum() -> launch.BoundKernel:
    return launch.BoundKernel(red_sum_kernel, {"BLOCK": 256}, {"num_warps": 4})


def red(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    save: bool,
) -> Tensor:
    """Implement :func:`reft_kernels.reference.red`."""
    d = source.shape[1]
    num_rows = allocation.num_selected_rows(source, rows)
    saved_input = allocation.red_saved_input(source, rows, save)
    if num_rows == 0:
        return saved_input
    config = red_config(num_rows, d, scale.shape[0] if weight_ids is not None else 1)
    launch.launch(
        _bound_forward(config, save, source.device.type),
        (common.cdiv(num_rows, config.block_n), common.cdiv(d, config.block_d)),
        (
            source,
            out,
            common.contiguous(rows),
            common.contiguous(weight_ids),
            common.contiguous(scale),
            common.contiguous(bias),
            saved_input,
        ),
        (num_rows, d, *source.stride(), *out.stride()),
    )
    return saved_input


def red_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Implement :func:`reft_kernels.reference.red_backward`."""
    d = grad.shape[1]
    num_rows = allocation.num_selected_rows(grad, rows)
    sets = scale.shape[0] if weight_ids is not None else 1
    grad_scale, grad_bias = allocation.red_gradients(grad, scale, need_weights)
    if num_rows == 0:
        return grad_scale.zero_(), grad_bias.zero_()
    if out is None and not need_weights:
        return grad_scale, grad_bias
    config = red_config(num_rows, d, sets)
    blocks = common.cdiv(d, config.block_d)
    partials = grad_scale  # not used with one chunk; the same type, so that one kernel is compiled
    if need_weights and config.chunks > 1:
        partials = grad.new_empty(config.chunks * 2 * sets * d, dtype=torch.float32)
    saved_strides = saved_input.stride() if saved_input.dim() == 2 else (0, 0)
    launch.launch(
        _bound_backward(config, need_weights, grad.device.type),
        (blocks, config.chunks, sets),
        (
            grad,
            out,
            saved_input,
            common.contiguous(rows),
            common.contiguous(weight_ids),
            common.contiguous(scale),
            grad_scale,
            grad_bias,
            partials,
        ),
        (
            num_rows,
            sets,
            config.chunks,
            d,
            *grad.stride(),
            *(out.stride() if out is not None else (0, 0)),
            *saved_strides,
        ),
    )
    if need_weights and config.chunks > 1:
        size = sets * d
        launch.launch(
            _bound_sum(),
            (common.cdiv(size, 256),),
            (grad_scale, grad_bias, partials),
            (size, config.chunks),
        )
    return grad_scale, grad_bias
