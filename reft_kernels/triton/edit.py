"""Forward pass of the edit: one launch for a layer, or two where the weights are large.

A program processes BLOCK_N rows. It loops over the columns twice: first to compute z = A x, or
(A - B) x, and then to compute y = x + B^T (coeff * u). x is read again in the second loop.
With weight sets, a program repeats this for each set that occurs in its rows; each row is still
read and written for one set only.

Each step of a loop divides its columns among the warps: the products are batches of SLICES small
products, so that no two warps load, split or multiply the same weights, and the sum over the slices
is computed once, after the loop. The loads of a step are issued while previous steps are computed.

Few rows at large ranks take the two launches of :mod:`reft_kernels.triton.edit_split` instead.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, edit_all_rows, edit_split, edit_tile, launch

FEW_ROWS = 1024  # more rows are bandwidth-bound: the weights are shared by more rows per program
_BUFFERS = 92 * 1024  # GPUs of compute capability 8.6 and 8.9 have 99 KiB for a program
_BUFFERS_WIDE = 64 * 1024  # the products of fp32 hidden states need more memory of their own
_BUFFERS_AMD = 48 * 1024


@dataclass(frozen=True)
class EditConfig:
    """Launch parameters of ``edit_kernel``."""

    block_n: int  # rows per program
    block_d: int  # columns per step, divided among the slices
    block_r: int  # rank, padded to a power of two
    slices: int  # parts of a step's columns, one for each warp
    num_warps: int
    read_stages: int  # steps of the first loop whose loads are in flight, plus one
    write_stages: int  # the same for the second loop


@functools.lru_cache(maxsize=1024)
def edit_config(
    num_rows: int, d: int, rank: int, dtype: torch.dtype, second: bool = False, amd: bool = False
) -> EditConfig:
    """Return the launch parameters of ``edit_kernel`` for a shape.

    The number of rows matters only in whether it exceeds FEW_ROWS, so that a change of it compiles
    at most two kernels. The tiles compile without register spills on sm_80, sm_90, sm_100 and
    gfx942 (tests/triton/aot.py). Not tuned on a GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        second: Whether B is loaded in the first loop, too (subtracted projection).
        amd: Whether the target is an AMD GPU.
    """
    block_r = max(common.MIN_DOT if amd else 8, common.next_power_of_2(rank))
    wide = dtype == torch.float32
    sums = block_r * (2 if second else 1)  # columns of the accumulators
    if num_rows <= FEW_ROWS:
        # Launch-bound: few rows per program distribute the rows over the SMs, but each program
        # reads all weights, so there are more rows per program if the weights are large.
        block_n, slices, most = (8 if block_r == 8 else 16), 8, 64
    else:
        # At most 64 registers of a thread hold sums; fp32 and two sums need registers of their own
        block_n = 2048 // (sums * (2 if wide else 1) * (2 if second else 1))
        block_n, slices, most = max(16, min(block_n, 32 if amd or second else 64)), 4, 32
    if sums * (2 if wide else 1) >= 64 or (wide and second):
        most = common.MIN_DOT
    if sums >= 128:
        slices = 8 if sums == 128 else 4
        block_n = 8 if wide else 16
    if amd:  # 4 wavefronts have as many threads as 8 warps
        block_n, slices, most = max(16, block_n), 4, min(32, most)
    # Bytes of a step of each loop, divided by its columns
    x = block_n * dtype.itemsize
    reading = x + block_r * (2 if second else 1) * 4
    writing = x + edit_tile.inner_rank(block_r) * 4
    budget = _BUFFERS_AMD if amd else _BUFFERS_WIDE if wide else _BUFFERS
    block_d = slices * common.MIN_DOT
    columns = min(slices * most, common.next_power_of_2(d))
    while block_d < columns and 2 * block_d * (2 * max(reading, writing) + x) <= budget:
        block_d *= 2
    if (d & -d) >= slices * common.MIN_DOT:
        block_d = min(block_d, d & -d)  # divides d, so that no column needs a mask

    def stages(column: int, reserved: int) -> int:
        return 1 + max(1, min(budget // block_d - reserved, 3 * column) // column)

    # The second loop also exchanges its results between threads
    return EditConfig(
        block_n, block_d, block_r, slices, slices, stages(reading, 0), stages(writing, x)
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
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    READ_STAGES: tl.constexpr,
    WRITE_STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SMALL_PRECISION: tl.constexpr,
):
    """Compute the edit of BLOCK_N rows; arguments as in :func:`edit`, with None for absent ones.

    EVEN means that BLOCK_D divides d.
    """
    FOLD: tl.constexpr = SUBTRACT and ACTIVATION == "linear"
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_rows
    row, valid, row_set, first_set, last_set = edit_tile.find_rows(
        rows, weight_ids, n, inside, BLOCK_N
    )
    part = edit_tile.columns(SLICES, BLOCK_D // SLICES)
    x_rows = source + row[None, :, None] * source_stride_n
    i = tl.arange(0, BLOCK_R)[None, None, :]
    for s in range(first_set, last_set + 1):
        active = valid
        stored = inside
        if weight_ids is not None:
            active = valid & (row_set == s)
            stored = inside & (row_set == s)
        weights = tl.cast(s, tl.int64) * r
        x_mask = active[None, :, None]
        z = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        q = z
        if read is not None or FOLD:
            z = edit_tile.project(
                x_rows,
                x_mask,
                source_stride_d,
                read,
                write,
                (weights + i) * d,
                i < r,
                d,
                part,
                d,
                FOLD,
                EVEN,
                BLOCK_N,
                BLOCK_R,
                SLICES,
                READ_STAGES,
                PRECISION,
            )
        if SUBTRACT and not FOLD:
            # A second loop: two accumulators and the terms of two matrices would spill registers
            q = edit_tile.project(
                x_rows,
                x_mask,
                source_stride_d,
                write,
                write,
                (weights + i) * d,
                i < r,
                d,
                part,
                d,
                False,
                EVEN,
                BLOCK_N,
                BLOCK_R,
                SLICES,
                READ_STAGES,
                PRECISION,
            )
        u = edit_tile.subspace(
            z,
            q,
            read_bias,
            subtract_bias,
            coeff,
            u_out,
            z_out,
            active,
            stored,
            weights,
            r,
            SUBTRACT,
            ACTIVATION,
            SAVE,
            BLOCK_N,
            BLOCK_R,
        )
        edit_tile.add_edit(
            x_rows,
            out + row[None, :, None] * out_stride_n,
            saved_input + n[None, :, None].to(tl.int64) * d,
            x_mask,
            stored[None, :, None],
            source_stride_d,
            out_stride_d,
            write,
            weights,
            u,
            d,
            r,
            part,
            d,
            SAVE and rows is not None,
            EVEN,
            BLOCK_N,
            BLOCK_R,
            SLICES,
            WRITE_STAGES,
            SMALL_PRECISION,
        )


@functools.lru_cache(maxsize=1024)
def _bound(
    config: EditConfig,
    d: int,
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
            "EVEN": d % config.block_d == 0,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "SLICES": config.slices,
            "READ_STAGES": config.read_stages,
            "WRITE_STAGES": config.write_stages,
            "PRECISION": common.dot_precision(dtype),
            "SMALL_PRECISION": common.small_precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.write_stages,
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
    rows, weight_ids, read, read_bias, subtract_bias, coeff = map(
        common.contiguous, (rows, weight_ids, read, read_bias, subtract_bias, coeff)
    )
    write = write.contiguous()
    if rows is None and num_rows > FEW_ROWS and weight_ids is None and not subtract_projection:
        on_chip = edit_all_rows.all_rows_config(
            d,
            rank,
            source.dtype,
            common.shared_memory(source.device),
            common.IS_AMD,
            all(w is None or w.dtype == source.dtype for w in (read, write)),
        )
        if on_chip is not None:
            edit_all_rows.launch_all_rows(
                on_chip, source, out, read, read_bias, write, coeff, u, z, activation, save
            )
            return saved_input, u, z
    split = None
    if read is not None or subtract_projection:
        split = edit_split.split_config(
            num_rows, d, rank, source.dtype, write.dtype, 1 + (read is not None), common.IS_AMD
        )
    if split is not None:
        edit_split.launch_edit(
            split,
            source,
            out,
            rows,
            weight_ids,
            read,
            read_bias,
            write,
            subtract_bias,
            coeff,
            (saved_input, u, z),
            num_rows,
            subtract_projection,
            activation,
            save,
        )
        return saved_input, u, z
    config = edit_config(num_rows, d, rank, source.dtype, subtract_projection, common.IS_AMD)
    launch.launch(
        _bound(config, d, source.dtype, source.device.type, subtract_projection, activation, save),
        (common.cdiv(num_rows, config.block_n),),
        (
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
            u,
            z,
        ),
        (num_rows, d, rank, *source.stride(), *out.stride()),
    )
    return saved_input, u, z
