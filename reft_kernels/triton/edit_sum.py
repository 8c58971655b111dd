"""Sum of the partial gradients of the edit's weights over chunks of rows.

The partial sums of a chunk are dB, dA ``[S, r, d]``, dc and dp ``[S, r]``, each padded to a
multiple of 16 values. The last program of :mod:`reft_kernels.triton.edit_gradient` adds them, or a
launch of ``sum_kernel`` (:mod:`reft_kernels.triton.reduction`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from reft_kernels.triton import reduction


@triton.jit
def sum_partials(
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
    READS: tl.constexpr,
    SUBTRACT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the sums of one block of columns and one weight set over all chunks."""
    i = tl.arange(0, BLOCK_R)
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + col[None, :]
    mask = (i < r)[:, None] & (col < d)[None, :]
    matrix = tl.cast(num_sets, tl.int64) * r * d
    vector = reduction.padded(tl.cast(num_sets, tl.int64) * r)
    size = 2 * reduction.padded(matrix) + 2 * vector
    tl.store(
        grad_write + offsets, reduction.sum_chunks(partials, offsets, mask, size, chunks), mask=mask
    )
    partials += reduction.padded(matrix)
    if READS:
        tl.store(
            grad_read + offsets,
            reduction.sum_chunks(partials, offsets, mask, size, chunks),
            mask=mask,
        )
    partials += reduction.padded(matrix)
    b_offsets = tl.cast(s, tl.int64) * r + i
    b_mask = i + block * BLOCK_R < r  # only block 0 stores the bias gradients
    tl.store(
        grad_read_bias + b_offsets,
        reduction.sum_chunks(partials, b_offsets, b_mask, size, chunks),
        mask=b_mask,
    )
    if SUBTRACT:
        tl.store(
            grad_subtract_bias + b_offsets,
            reduction.sum_chunks(partials + vector, b_offsets, b_mask, size, chunks),
            mask=b_mask,
        )


@triton.jit(do_not_specialize=["num_rows", "counter_groups", "num_sets", "chunks"])
def sum_kernel(
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
    READS: tl.constexpr,
    SUBTRACT: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the partial sums of ``gradient_kernel``'s chunks, in a launch of its own."""
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    sum_partials(
        workspace + counter_groups * 16 + (3 if SECOND else 2) * size,
        grad_read,
        grad_read_bias,
        grad_write,
        grad_subtract_bias,
        num_sets,
        chunks,
        d,
        r,
        tl.program_id(0),
        tl.program_id(1),
        READS,
        SUBTRACT,
        BLOCK_D,
        BLOCK_R,
    )
