"""Launch configuration and scratch memory of the orthonormal maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from reft_kernels.triton import common
from reft_kernels.triton import launch as triton_launch


@dataclass(frozen=True)
class BuildConfig:
    """Launch parameters of both kernels."""

    tile: int  # N: r x r matrices are processed in N x N tiles
    padded: int  # LD: r rounded up to a multiple of N
    block_d: int  # rows of V per fp32 sum
    block_k: int  # columns of the rank dimension contracted per step of the output loop
    block_j: int  # rows of R per step of the output loop
    block_c: int  # columns of R (rows of grad_X) per step of the output loop
    splits: int  # programs per layer
    chunk: int  # rows of V that a program writes, a multiple of block_c
    num_warps: int
    num_stages: int

    def constexprs(self) -> dict[str, int]:
        """Return the constexpr arguments of the kernels."""
        return {
            "N": self.tile,
            "LD": self.padded,
            "BLOCK_D": self.block_d,
            "BLOCK_K": self.block_k,
            "BLOCK_J": self.block_j,
            "BLOCK_C": self.block_c,
        }


_MAX_TILE = 32  # an fp64 tile of 64 x 64 causes register spills
# Rows per fp32 sum by tile size; 4 and 8 keep 16 sums per thread in registers
_BLOCK_D = {4: 256, 8: 64, 16: 32, 32: 32}
# Every split repeats the Gram sum, so more splits save little. Not tuned on a GPU yet.
_MAX_SPLITS = 8
_MAX_SCRATCH = 64 << 20  # bytes; large r uses fewer splits instead of more memory. Not tuned yet.


@functools.lru_cache(maxsize=1024)
def build_config(layers: int, d: int, r: int, processors: int) -> BuildConfig:
    """Return the launch parameters of ``layers`` matrices ``[d, r]``.

    Args:
        layers: L.
        d: Number of rows of X.
        r: Rank.
        processors: Number of multiprocessors of the device.
    """
    tile = min(_MAX_TILE, max(4, triton.next_power_of_2(r)))
    padded = triton.cdiv(r, tile) * tile
    block_c = 64  # not tuned on a GPU yet
    chunks = triton.cdiv(d, block_c)
    scratch = 72 * padded**2 * max(layers, 1)  # bytes per split: 7 fp64 and 4 fp32 matrices
    splits = max(1, min(processors // max(layers, 1), _MAX_SPLITS, chunks, _MAX_SCRATCH // scratch))
    chunk = triton.cdiv(chunks, splits) * block_c
    return BuildConfig(
        tile=tile,
        padded=padded,
        block_d=_BLOCK_D[tile],
        # The minimum of tl.dot, which keeps this many values of each row in registers
        block_k=16,
        block_j=max(16, tile),
        block_c=block_c,
        splits=triton.cdiv(d, chunk),
        chunk=chunk,
        # One program per multiprocessor needs several warps to hide latency. Not tuned yet.
        num_warps=8,
        num_stages=1,  # prefetching would cause register spills
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _bound(
    kernel: Any, config: BuildConfig, is_cayley: bool, device_type: str
) -> triton_launch.BoundKernel:
    return triton_launch.BoundKernel(
        kernel,
        {"CAYLEY": is_cayley, **config.constexprs()},
        {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **common.compile_options(device_type),
        },
    )


def launch(
    kernel: Any, config: BuildConfig, X: Tensor, is_cayley: bool, *args: Tensor | None
) -> None:
    """Launch a kernel for X ``[L, d, r]``; ``args`` are its tensor arguments."""
    layers, d, r = X.shape
    bound = _bound(kernel, config, is_cayley, X.device.type)
    triton_launch.launch(bound, (config.splits, layers), args, (d, r, config.chunk))


def allocate_scratch(
    config: BuildConfig, X: Tensor, wide: int, narrow: int
) -> tuple[Tensor, Tensor]:
    """Allocate ``wide`` fp64 and ``narrow`` fp32 matrices ``[LD, LD]`` for each program."""
    size = X.shape[0] * config.splits * config.padded**2
    return X.new_empty(wide * size, dtype=torch.float64), X.new_empty(
        narrow * size, dtype=torch.float32
    )
