"""First launch of the edit's backward pass: dz, coeff * u, ddelta and dcoeff.

With delta = B g, the kernel computes ddelta = coeff * delta, dz = act'(z) * ddelta and
dcoeff = u * delta, all ``[N, r]``. It reads g once. Each program processes BLOCK_N rows. The
products are batched: each warp sums over its own columns, so that no warp waits for a long chain of
dependent products, and each weight is split into bf16 terms by one warp of the program only.

Few rows at large ranks take two launches: the partial sums of delta over parts of the columns
(:mod:`reft_kernels.triton.edit_split`), and ``factors_kernel``, which adds them.

The kernel also sets the second launch's counters to zero (:mod:`reft_kernels.triton.reduction`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from reft_kernels.triton import common, edit_split, edit_tile, factors, launch

_STAGE_BYTES = 20 * 1024
_BUFFER_BYTES = 92 * 1024  # GPUs of compute capability 8.6 and 8.9 have 99 KiB for a program


@dataclass(frozen=True)
class DeltaConfig:
    """Launch parameters of ``delta_kernel``."""

    block_n: int  # rows per program
    block_d: int  # columns per step, a multiple of 16 * num_warps
    block_r: int
    num_warps: int
    num_stages: int  # buffers of the loads


@functools.lru_cache(maxsize=1024)
def delta_config(
    num_rows: int, d: int, rank: int, dtype: torch.dtype, amd: bool = False
) -> DeltaConfig:
    """Return the launch parameters of ``delta_kernel``.

    Few rows are shared by more programs. There are two configurations for a shape of the weights,
    so that a change of the number of rows compiles at most two kernels. Not tuned on a GPU yet.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        amd: Whether the target is an AMD GPU.
    """
    block_r = factors.padded_rank(rank, dtype)
    size = dtype.itemsize
    block_n = 16 if num_rows < 4096 or block_r > 32 or size == 4 else 64
    num_warps = 4
    columns = num_warps * 16
    buffers = 24 * 1024 if amd else _BUFFER_BYTES

    def stage(block_d: int) -> int:
        return block_d * (block_n * size + block_r * 4)

    while columns < min(d, num_warps * 64) and stage(2 * columns) <= min(_STAGE_BYTES, buffers):
        columns *= 2
    num_stages = 2 if amd else max(2, min(5, buffers // stage(columns)))
    return DeltaConfig(block_n, columns, block_r, num_warps, num_stages)


@triton.jit
def clear_counters(workspace, counter_groups):
    """Set the second launch's counters to zero."""
    lane = tl.arange(0, 16)
    for group in range(tl.program_id(0), counter_groups, tl.num_programs(0)):
        tl.store(workspace.to(tl.pointer_type(tl.int32)) + group * 16 + lane, 0)


@triton.jit
def store_factors(
    delta,
    n,
    inside,
    valid,
    coeff,
    u,
    z,
    workspace,
    dcoeff_out,
    num_rows,
    counter_groups,
    r,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store the factors and dcoeff of the entries n, given delta ``[BLOCK_N, BLOCK_R]``."""
    i = tl.arange(0, BLOCK_R)
    small = n.to(tl.int64)[:, None] * r + i[None, :]
    inside_small = inside[:, None] & (i < r)[None, :]
    valid_small = valid[:, None] & (i < r)[None, :]
    used = tl.load(u + small, mask=valid_small, other=0.0)
    ddelta = delta
    if coeff is not None:
        tl.store(dcoeff_out + small, used * delta, mask=inside_small)
        c = tl.load(coeff + small, mask=valid_small, other=0.0).to(tl.float32)
        ddelta = c * delta
        used *= c
    dz = ddelta
    if ACTIVATION != "linear":
        saved = tl.load(z + small, mask=valid_small, other=0.0)
        dz = ddelta * common.activation_derivative(saved, ACTIVATION)
    dz_out = workspace + counter_groups * 16
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    row_mask = inside[:, None]
    factors.store(dz_out, n, i, dz, row_mask, BLOCK_R, TERMS)
    factors.store(dz_out + size, n, i, used, row_mask, BLOCK_R, TERMS)
    if SECOND:
        factors.store(dz_out + 2 * size, n, i, -ddelta, row_mask, BLOCK_R, TERMS)


@triton.jit(do_not_specialize=["num_rows", "counter_groups"])
def delta_kernel(
    grad,
    rows,
    weight_ids,
    write,
    coeff,
    u,
    z,
    workspace,
    dcoeff_out,
    num_rows,
    counter_groups,
    d,
    r,
    grad_stride_n,
    grad_stride_d,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,
    TERMS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the factors of BLOCK_N rows; see :func:`launch_delta`."""
    BLOCK_K: tl.constexpr = BLOCK_D // BATCH
    clear_counters(workspace, counter_groups)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = tl.arange(0, BLOCK_R)
    inside = n < num_rows
    row, valid, row_set, first_set, last_set = edit_tile.find_rows(
        rows, weight_ids, n, inside, BLOCK_N
    )
    part = edit_tile.columns(BATCH, BLOCK_K)
    acc = tl.zeros((BATCH, BLOCK_N, BLOCK_R), tl.float32)
    for s in range(first_set, last_set + 1):
        active = valid
        if weight_ids is not None:
            # Rows of other sets and skipped rows are loaded as zeros
            active = valid & (row_set == s)
        g_rows = grad + row[None, :, None] * grad_stride_n
        w_rows = write + (tl.cast(s, tl.int64) * r + i[None, :, None]) * d
        for start in tl.range(0, d, BLOCK_D, num_stages=STAGES):
            col = start + part
            g = tl.load(
                g_rows + col.to(tl.int64) * grad_stride_d,
                mask=active[None, :, None] & (col < d),
                other=0.0,
            )
            w = tl.load(w_rows + col, mask=(i < r)[None, :, None] & (col < d), other=0.0)
            acc = edit_tile.add_product(acc, g, w, PRECISION)
    store_factors(
        tl.sum(acc, 0),
        n,
        inside,
        valid,
        coeff,
        u,
        z,
        workspace,
        dcoeff_out,
        num_rows,
        counter_groups,
        r,
        ACTIVATION,
        SECOND,
        TERMS,
        BLOCK_R,
    )


@triton.jit(do_not_specialize=["num_rows", "counter_groups", "partial_groups"])
def factors_kernel(
    rows,
    coeff,
    u,
    z,
    workspace,
    dcoeff_out,
    num_rows,
    counter_groups,
    partial_groups,
    r,
    ACTIVATION: tl.constexpr,
    SECOND: tl.constexpr,
    TERMS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Compute the factors of BLOCK_N rows from the partial sums of delta."""
    clear_counters(workspace, counter_groups)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_rows
    valid = inside
    if rows is not None:
        valid = tl.load(rows + n, mask=inside, other=-1) >= 0
    partials = workspace + tl.cast(partial_groups, tl.int64) * 16
    size = tl.cast(num_rows, tl.int64) * BLOCK_R
    store_factors(
        edit_split.sum_parts(partials, n, inside, size, PARTS, BLOCK_N, BLOCK_R),
        n,
        inside,
        valid,
        coeff,
        u,
        z,
        workspace,
        dcoeff_out,
        num_rows,
        counter_groups,
        r,
        ACTIVATION,
        SECOND,
        TERMS,
        BLOCK_R,
    )


@functools.lru_cache(maxsize=1024)
def _bound(
    config: DeltaConfig,
    rank: int,
    dtype: torch.dtype,
    device_type: str,
    activation: str,
    second: bool,
) -> launch.BoundKernel:
    return launch.BoundKernel(
        delta_kernel,
        {
            "ACTIVATION": activation,
            "SECOND": second,
            "TERMS": factors.terms(rank, dtype),
            "BATCH": config.num_warps,
            "BLOCK_N": config.block_n,
            "BLOCK_D": config.block_d,
            "BLOCK_R": config.block_r,
            "STAGES": config.num_stages,
            "PRECISION": common.dot_precision(dtype),
        },
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **common.compile_options(device_type),
        },
    )


@functools.lru_cache(maxsize=1024)
def _bound_factors(
    config: edit_split.SplitConfig, rank: int, dtype: torch.dtype, activation: str, second: bool
) -> launch.BoundKernel:
    return launch.BoundKernel(
        factors_kernel,
        {
            "ACTIVATION": activation,
            "SECOND": second,
            "TERMS": factors.terms(rank, dtype),
            "PARTS": config.parts,
            "BLOCK_N": config.block_n,
            "BLOCK_R": config.block_r,
        },
        {"num_warps": 4},
    )


def split_delta(num_rows: int, write: Tensor, dtype: torch.dtype) -> edit_split.SplitConfig | None:
    """Return the launch parameters of delta in two launches; None where one takes less time."""
    rank, d = write.shape[-2:]
    return edit_split.split_config(num_rows, d, rank, dtype, write.dtype, 1, common.IS_AMD)


def launch_delta(
    grad: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    u: Tensor,
    z: Tensor,
    workspace: Tensor,
    counter_groups: int,
    grad_coeff: Tensor,
    activation: str,
    second: bool,
    split: edit_split.SplitConfig | None = None,
    partial_groups: int = 0,
) -> None:
    """Launch :func:`delta_kernel`, or with ``split`` the partial sums and ``factors_kernel``.

    Args:
        grad: g ``[M, d]``, with any strides.
        rows, weight_ids, write, coeff, u, z: As in :func:`reft_kernels.reference.edit_backward`,
            contiguous.
        workspace: fp32, receives 16 * counter_groups zeros of type int32, then the factors dz,
            coeff * u and, with ``second``, -ddelta (:mod:`reft_kernels.triton.factors`).
        counter_groups: Number of groups of 16 counters.
        grad_coeff: fp32 ``[N, r]``, output; not written without ``coeff``.
        activation: Canonical activation name.
        second: Whether ddelta differs from dz and is needed.
        split: Result of :func:`split_delta`.
        partial_groups: Groups of 16 words of ``workspace`` before the partial sums of ``split``.
    """
    num_rows, rank = u.shape
    d = grad.shape[1]
    if split is not None:
        edit_split.launch_project(
            *(split, grad, rows, weight_ids, write, write, workspace, partial_groups, num_rows),
            fold=False,
            second=False,
        )
        launch.launch(
            _bound_factors(split, rank, grad.dtype, activation, second),
            (common.cdiv(num_rows, split.block_n),),
            (rows, coeff, u, z, workspace, grad_coeff),
            (num_rows, counter_groups, partial_groups, rank),
        )
        return
    config = delta_config(num_rows, d, rank, grad.dtype, common.IS_AMD)
    launch.launch(
        _bound(config, rank, grad.dtype, grad.device.type, activation, second),
        (common.cdiv(num_rows, config.block_n),),
        (grad, rows, weight_ids, write, coeff, u, z, workspace, grad_coeff),
        (num_rows, counter_groups, d, rank, *grad.stride()),
    )
