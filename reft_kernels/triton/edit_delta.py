"""First launch of the edit's backward pass: dz, ddelta and dcoeff.

With delta = B g, the kernel computes ddelta = coeff * delta, dz = act'(z) * ddelta and
dcoeff = u * delta, all ``[N, r]``. It reads g once. Each program processes BLOCK_N rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@functools.lru_cache(maxsize=1024)
def delta_config(
    num_rows: int, d: int, rank: int, dtype: torch.dtype, amd: bool = False
) -> EditConfig:
    """Return the launch parameters of ``delta_kernel``.

    They are those of ``edit_kernel``, except for 64 rows per program where 32 cause register spills
    on sm_90 and sm_100. Not tuned on a GPU yet.
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
    """Compute dz, ddelta and dcoeff of BLOCK_N rows; see :func:`launch_delta`."""
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
        active = valid
        if weight_ids is not None:
            active = valid & (row_set == s)
        acc = common.product_start(BLOCK_N, BLOCK_R, BLOCK_D, USE_DOT)
        for start in range(0, d, BLOCK_D):
            col = start + tl.arange(0, BLOCK_D)
            g_offsets = row[:, None] * grad_stride_n + col[None, :].to(tl.int64) * grad_stride_d
            g = tl.load(grad + g_offsets, mask=active[:, None] & (col < d)[None, :], other=0.0)
            w_offsets = (tl.cast(s, tl.int64) * r + i[:, None]) * d + col[None, :]
            w = tl.load(
                write + w_offsets, mask=(i < r)[:, None] & (col < d)[None, :], other=0.0
            ).to(tl.float32)
            acc = common.product_step(acc, g, w, USE_DOT, PRECISION)
        # Rows of other sets and skipped rows were loaded as zeros
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


@functools.lru_cache(maxsize=1024)
def _bound(
    config: EditConfig, dtype: torch.dtype, device_type: str, activation: str
) -> launch.BoundKernel:
    return launch.BoundKernel(
        delta_kernel,
        {
            "ACTIVATION": activation,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "USE_DOT": config.use_dot,
            "PRECISION": common.dot_precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **common.compile_options(device_type),
        },
    )


def launch_delta(
    grad: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    u: Tensor,
    z: Tensor,
    dz: Tensor,
    ddelta: Tensor | None,
    grad_coeff: Tensor,
    activation: str,
) -> None:
    """Launch :func:`delta_kernel`.

    Args:
        grad: g ``[M, d]``, with any strides.
        rows, weight_ids, write, coeff, u, z: As in :func:`reft_kernels.reference.edit_backward`,
            contiguous.
        dz: fp32 ``[N, r]``, output.
        ddelta: fp32 ``[N, r]``, output, or None if it equals ``dz`` or is not needed.
        grad_coeff: fp32 ``[N, r]``, output; not written without ``coeff``.
        activation: Canonical activation name.
    """
    num_rows, rank = dz.shape
    d = grad.shape[1]
    config = delta_config(num_rows, d, rank, grad.dtype, common.IS_AMD)
    launch.launch(
        _bound(config, grad.dtype, grad.device.type, activation),
        (common.cdiv(num_rows, config.block_n),),
        (grad, rows, weight_ids, write, coeff, u, z, dz, ddelta, grad_coeff),
        (num_rows, d, rank, *grad.stride()),
    )
