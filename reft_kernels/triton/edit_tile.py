"""Steps of the edit's forward kernels for a tile of rows.

Tiles of hidden states ``[SLICES, N, D]`` and of weights ``[SLICES, R, D]`` hold SLICES * D columns,
divided among the warps: products are batched over the slices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from reft_kernels.triton import common


def inner_rank(block_r: int) -> int:
    """Return the inner dimension of the product B^T u, which tensor cores need to be 16 or more."""
    return max(common.MIN_DOT, block_r)


@triton.jit
def find_rows(rows, weight_ids, n, inside, BLOCK_N: tl.constexpr):
    """Return the entries' rows in int64, whether they are valid, their sets and the sets' range.

    Skipped entries belong to the first set of the range, which saves zeros for them, so that they
    add nothing to the weights' gradients.
    """
    row = n.to(tl.int64)
    valid = inside
    if rows is not None:
        row = tl.load(rows + n, mask=inside, other=-1).to(tl.int64)
        valid = row >= 0
    first_set = 0
    last_set = 0
    row_set = tl.zeros((BLOCK_N,), tl.int32)
    if weight_ids is not None:
        row_set = tl.load(weight_ids + n, mask=valid, other=0)
        last_set = tl.max(tl.where(valid, row_set, 0), 0)
        first_set = tl.min(tl.where(valid, row_set, last_set), 0)
        row_set = tl.where(valid, row_set, first_set)
    return row, valid, row_set, first_set, last_set


@triton.jit
def columns(SLICES: tl.constexpr, D: tl.constexpr):
    """Return the column numbers ``[SLICES, 1, D]`` of a tile."""
    return tl.arange(0, SLICES)[:, None, None] * D + tl.arange(0, D)[None, None, :]


@triton.jit
def column_mask(mask, col, d, EVEN: tl.constexpr):
    """Return the mask of a tile's elements; EVEN means that all columns are inside."""
    if EVEN:
        return mask
    else:
        return mask & (col < d)


@triton.jit
def read_weight(read, write, offsets, mask, FOLD: tl.constexpr):
    """Load a tile of the matrix that z multiplies x with.

    This is A, with FOLD it is A - B in fp32, and without a read matrix it is -B.
    """
    if read is not None:
        a = tl.load(read + offsets, mask=mask, other=0.0)
        if FOLD:
            b = tl.load(write + offsets, mask=mask, other=0.0)
            a = a.to(tl.float32) - b.to(tl.float32)
    else:
        a = -tl.load(write + offsets, mask=mask, other=0.0)
    return a


@triton.jit
def add_product(acc, x, w, PRECISION: tl.constexpr):
    """Return acc + x w^T, batched over the slices, for w in fp32 or a half-precision dtype."""
    return common.add_product(acc, x, tl.permute(w, (0, 2, 1)), PRECISION)


@triton.jit
def project(
    x_rows,
    x_mask,
    x_stride_d,
    read,
    write,
    w_rows,
    w_mask,
    d,
    part,
    extent,
    FOLD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return x w^T ``[N, R]`` for the matrix w of :func:`read_weight`.

    Args:
        x_rows: Pointers to the rows of x, ``[1, N, 1]``.
        w_rows: Offsets of the rows of w, ``[1, 1, R]``, with the mask w_mask.
        part: Columns of the first tile.
        extent: Columns to sum over, from those of the first tile on.
        STAGES: Steps whose loads are in flight, plus one.

    The tile of w is loaded as ``[SLICES, D, R]``: the layouts of loads of one shape are shared, and
    one for x in half precision gives a thread 32 bytes of w in two loads of half a sector each.
    """
    D: tl.constexpr = part.shape[0] * part.shape[2]
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_R), tl.float32)
    for start in tl.range(0, extent, D, num_stages=STAGES):
        col = start + part
        x = tl.load(
            x_rows + col.to(tl.int64) * x_stride_d,
            mask=column_mask(x_mask, col, d, EVEN),
            other=0.0,
        )
        if write.dtype.element_ty == x.dtype:  # as many bytes as x, so its layout serves both
            rows, mask = tl.permute(w_rows, (0, 2, 1)), tl.permute(w_mask, (0, 2, 1))
            w = read_weight(read, write, rows + col, column_mask(mask, col, d, EVEN), FOLD)
            w = tl.permute(w, (0, 2, 1))
        else:
            w_col = tl.permute(col, (0, 2, 1))
            w = read_weight(read, write, w_rows + w_col, column_mask(w_mask, w_col, d, EVEN), FOLD)
        acc = common.add_product(acc, x, w, PRECISION)
    return tl.sum(acc, 0)


@triton.jit
def subspace(
    z,
    q,
    read_bias,
    subtract_bias,
    coeff,
    u_out,
    z_out,
    active,
    stored,
    bias_offset,
    r,
    SUBTRACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return coeff * u ``[N, R]``, zero outside of ``active``, and save u and z.

    Args:
        z: A x or, with a linear activation and SUBTRACT, (A - B) x.
        q: B x, if the activation is nonlinear and SUBTRACT holds.
        active: Rows of the present weight set.
        stored: Entries whose u and z are saved; those of other entries than ``active`` are zero.
        bias_offset: Offset of the present weight set's biases.
    """
    i = tl.arange(0, BLOCK_R)
    i_mask = i < r
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_N * r
    small = tl.arange(0, BLOCK_N)[:, None] * r + i[None, :]  # int32, which takes fewer registers
    small_mask = active[:, None] & i_mask[None, :]
    if read_bias is not None:
        z += tl.load(read_bias + bias_offset + i, mask=i_mask, other=0.0).to(tl.float32)[None, :]
    u = common.activate(z, ACTIVATION)
    if SUBTRACT and ACTIVATION != "linear":
        u -= q
    if subtract_bias is not None:
        bias = tl.load(subtract_bias + bias_offset + i, mask=i_mask, other=0.0)
        u -= bias.to(tl.float32)[None, :]
    u = tl.where(small_mask, u, 0.0)
    if SAVE:
        save_mask = stored[:, None] & i_mask[None, :]
        tl.store(u_out + first + small, u, mask=save_mask)
        if ACTIVATION != "linear":
            tl.store(z_out + first + small, tl.where(small_mask, z, 0.0), mask=save_mask)
    if coeff is not None:
        u *= tl.load(coeff + first + small, mask=small_mask, other=0.0).to(tl.float32)
    return u


@triton.jit
def batch(
    u, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, INNER: tl.constexpr
):
    """Return u ``[SLICES, N, INNER]``, repeated for each slice and padded with zeros."""
    if INNER > BLOCK_R:
        zeros = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        u = tl.reshape(tl.permute(tl.join(u, zeros), (0, 2, 1)), (BLOCK_N, INNER))
    return tl.broadcast_to(u[None, :, :], (SLICES, BLOCK_N, INNER))


@triton.jit
def add_edit(
    x_rows,
    y_rows,
    saved_rows,
    mask,
    stored,
    x_stride_d,
    y_stride_d,
    write,
    weights,
    u,
    d,
    r,
    part,
    extent,
    SAVE: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write y = x + B^T u for a tile of rows and, with SAVE, save x.

    Args:
        x_rows, y_rows, saved_rows: Pointers to the rows, ``[1, N, 1]``.
        mask, stored: Which rows are written, and which are saved, ``[1, N, 1]``.
        weights: Number of rows of ``write`` before those of the present weight set.
        u: ``[N, R]``.
        part: Columns of the first tile.
        extent: Columns to write, from those of the first tile on.
        STAGES: Steps whose loads are in flight, plus one.
    """
    INNER: tl.constexpr = BLOCK_R if BLOCK_R >= 16 else 16  # inner dimension of the product
    D: tl.constexpr = part.shape[0] * part.shape[2]
    k = tl.arange(0, INNER)[None, :, None]
    u = batch(u, SLICES, BLOCK_N, BLOCK_R, INNER)
    for done in tl.range(0, extent, D, num_stages=STAGES):
        # From the last columns to the first: the last ones read are still in the cache
        col = tl.cdiv(extent, D) * D - D - done + part
        column = col.to(tl.int64)
        x = tl.load(x_rows + column * x_stride_d, mask=column_mask(mask, col, d, EVEN), other=0.0)
        w = tl.load(
            write + (weights + k) * d + col, mask=column_mask(k < r, col, d, EVEN), other=0.0
        )
        y = x.to(tl.float32) + common.dot_small(u, w, PRECISION)
        if SAVE:
            tl.store(saved_rows + col, x, mask=column_mask(stored, col, d, EVEN))
        tl.store(y_rows + column * y_stride_d, y.to(x.dtype), mask=column_mask(mask, col, d, EVEN))
