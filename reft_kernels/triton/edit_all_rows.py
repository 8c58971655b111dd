"""Forward pass of the edit with each row of x read once: one launch for a layer.

The tile of BLOCK_N rows stays in registers between z = A x and y = x + B^T (coeff * u), so x is
read from memory once and written once, whatever the cache holds. All loads of x are issued before
the first product.

The tile takes BLOCK_N * d elements of the register file of an SM, so BLOCK_N is small for long
rows, and each program reads all weights from the L2 cache: for fp32 weights 8 r / BLOCK_N bytes for
each element of x, for bf16 weights half of that. At 16 rows of 8 KiB in bf16 and r = 8, the largest
tile, fp32 weights would be as many bytes from L2 as x and y together, and a second reading of x
costs no more. Rows of more than ON_CHIP_BYTES, or ON_CHIP_BYTES_EXACT for bf16 weights, are
therefore left to :mod:`reft_kernels.triton.edit`, which has more rows per program and reads x
again, as are selected rows, weight sets and subtracted projections.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.triton import common, edit_tile, launch

ON_CHIP_BYTES = 4096  # of a row
ON_CHIP_BYTES_EXACT = 8192  # of a row in bf16 if the weights are bf16, too


@dataclass(frozen=True)
class AllRowsConfig:
    """Launch parameters of ``edit_all_rows_kernel``."""

    block_n: int  # rows per program
    block_d: int  # columns of a tile, divided among the slices
    block_r: int  # rank, padded to a power of two
    tiles: int  # tiles of a row
    slices: int  # parts of a tile's columns, one for each warp
    num_warps: int


@functools.lru_cache(maxsize=1024)
def all_rows_config(
    d: int,
    rank: int,
    dtype: torch.dtype,
    shared_memory: int,
    amd: bool = False,
    exact: bool = False,
) -> AllRowsConfig | None:
    """Return the launch parameters of ``edit_all_rows_kernel``, or None where a tile does not fit.

    The tiles compile without register spills on sm_80, sm_90 and sm_100. Not tuned on a GPU yet.

    Args:
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        shared_memory: Bytes that a program can use.
        amd: Whether the target is an AMD GPU.
        exact: Whether the weights have the dtype of the hidden states.
    """
    size = d * dtype.itemsize
    long = size > ON_CHIP_BYTES
    if amd or rank > 8 or size > ON_CHIP_BYTES_EXACT:
        return None
    if long and not (exact and dtype == torch.bfloat16 and d % 512 == 0):  # masks take registers
        return None
    # Weights are read once for 32 rows where their tile leaves registers for the products
    wide = size <= 2048 or not long and dtype == torch.bfloat16 and d % 512 == 0
    block_n = 32 if dtype != torch.float32 and wide else 16
    if block_n * size + 20 * 1024 > shared_memory:
        return None
    widths = (512, 256, 128) if dtype != torch.float32 else (256, 128)
    if long:
        widths = (1024, 512)
    block_d = next((n for n in widths if d % n == 0), widths[0])
    block_d = min(block_d, max(128, common.next_power_of_2(d)))
    return AllRowsConfig(block_n, block_d, 8, common.cdiv(d, block_d), 8, 8)


@triton.jit(do_not_specialize=["num_rows"])
def edit_all_rows_kernel(
    source,
    out,
    read,
    read_bias,
    write,
    coeff,
    u_out,
    z_out,
    num_rows,
    d,
    r,
    source_stride_n,
    source_stride_d,
    out_stride_n,
    out_stride_d,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    EVEN: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Compute y = x + B^T (coeff * act(A x + c)) of BLOCK_N rows; arguments as in ``edit_kernel``.

    A row has TILES tiles of BLOCK_D columns.
    """
    INNER: tl.constexpr = BLOCK_R if BLOCK_R >= 16 else 16  # inner dimension of the second product
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_rows
    row = n.to(tl.int64)
    part = edit_tile.columns(SLICES, BLOCK_D // SLICES)
    x_rows = source + row[None, :, None] * source_stride_n
    y_rows = out + row[None, :, None] * out_stride_n
    i = tl.arange(0, BLOCK_R)[None, :, None]
    k = tl.arange(0, INNER)[None, :, None]
    x = ()
    for t in tl.static_range(TILES):
        col = t * BLOCK_D + part
        tile = tl.load(
            x_rows + col.to(tl.int64) * source_stride_d,
            mask=edit_tile.column_mask(inside[None, :, None], col, d, EVEN),
            other=0.0,
        )
        x = x + (tile,)  # type: ignore[assignment]
    z = tl.zeros((SLICES, BLOCK_N, BLOCK_R), tl.float32)
    if read is not None:
        for t in tl.static_range(TILES):
            col = t * BLOCK_D + part
            w = tl.load(
                read + i * d + col, mask=edit_tile.column_mask(i < r, col, d, EVEN), other=0.0
            )
            z = edit_tile.add_product(z, x[t], w, PRECISION)
    z = tl.sum(z, 0)
    # The next loads are issued one tile ahead
    w = tl.load(write + k * d + part, mask=edit_tile.column_mask(k < r, part, d, EVEN), other=0.0)
    u = edit_tile.subspace(
        z,
        z,
        read_bias,
        None,
        coeff,
        u_out,
        z_out,
        inside,
        inside,
        0,
        r,
        False,
        ACTIVATION,
        SAVE,
        BLOCK_N,
        BLOCK_R,
    )
    u = edit_tile.batch(u, SLICES, BLOCK_N, BLOCK_R, INNER)
    for t in tl.static_range(TILES):
        col = t * BLOCK_D + part
        present = w
        if t + 1 < TILES:
            following = BLOCK_D + col
            w = tl.load(
                write + k * d + following,
                mask=edit_tile.column_mask(k < r, following, d, EVEN),
                other=0.0,
            )
        y = x[t].to(tl.float32) + common.dot_small(u, present, SMALL_PRECISION)
        tl.store(
            y_rows + col.to(tl.int64) * out_stride_d,
            y.to(x[t].dtype),
            mask=edit_tile.column_mask(inside[None, :, None], col, d, EVEN),
        )


@functools.lru_cache(maxsize=1024)
def _bound(
    config: AllRowsConfig, d: int, dtype: torch.dtype, device_type: str, activation: str, save: bool
) -> launch.BoundKernel:
    return launch.BoundKernel(
        edit_all_rows_kernel,
        {
            "ACTIVATION": activation,
            "SAVE": save,
            "EVEN": d % config.block_d == 0,
            "TILES": config.tiles,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "SLICES": config.slices,
            "PRECISION": common.dot_precision(dtype),
            "SMALL_PRECISION": common.small_precision(dtype),
        },
        {"num_warps": config.num_warps, **common.compile_options(device_type)},
    )


def launch_all_rows(
    config: AllRowsConfig,
    source: Tensor,
    out: Tensor,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    u: Tensor,
    z: Tensor,
    activation: str,
    save: bool,
) -> None:
    """Launch :func:`edit_all_rows_kernel` with contiguous arguments; the first two have strides."""
    (num_rows, d), rank = source.shape, write.shape[-2]
    launch.launch(
        _bound(config, d, source.dtype, source.device.type, activation, save),
        (common.cdiv(num_rows, config.block_n),),
        (source, out, read, read_bias, write, coeff, u, z),
        (num_rows, d, rank, *source.stride(), *out.stride()),
    )
