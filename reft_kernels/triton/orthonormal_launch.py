"""Launch configuration and scratch memory of the orthonormal maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_kernels.triton import common
from reft_kernels.triton import launch as triton_launch
from reft_kernels.triton.orthonormal_gram import gram_kernel


@dataclass(frozen=True)
class BuildConfig:
    """Launch parameters of the kernels of both maps.

    What the sums over d are rounded to depends on d and r alone. ``splits`` and ``chunk`` also
    depend on the device and on the number of layers, but change no result.
    """

    tile: int  # N: r x r matrices are processed in N x N tiles
    padded: int  # LD: r rounded up to a multiple of N
    rows: int  # rows of V per partial sum, a multiple of block_d
    block_d: int  # rows of V per step of the partial sum
    block_p: int  # partial sums that are loaded together
    block_k: int  # columns of the rank dimension contracted per step of the output loop
    block_j: int  # rows of R (columns of grad_X) per step of the output loop
    block_c: int  # columns of R (rows of grad_X) per step of the output loop
    splits: int  # programs per layer of the second launch
    chunk: int  # rows of V that such a program writes, a multiple of block_c
    gram_warps: int
    num_warps: int
    gram_stages: int
    num_stages: int

    def gram_constexprs(self) -> dict[str, int]:
        """Return the constexpr arguments of the first launch."""
        return {
            "N": self.tile,
            "LD": self.padded,
            "ROWS": self.rows,
            "BLOCK_D": self.block_d,
            "STAGES": self.gram_stages,
        }

    def constexprs(self) -> dict[str, int]:
        """Return the constexpr arguments of the second launch."""
        return {
            "N": self.tile,
            "LD": self.padded,
            "ROWS": self.rows,
            "BLOCK_P": self.block_p,
            "BLOCK_K": self.block_k,
            "BLOCK_J": self.block_j,
            "BLOCK_C": self.block_c,
            "STAGES": self.num_stages,
        }


_MAX_TILE = 32  # an fp64 tile of 64 x 64 causes register spills
# By tile size. A thread keeps at most 64 sums of the first launch, and at most 16 of the second and
# the small matrices, in registers. Programs with one warp wait for no other warp at a barrier.
_BLOCK_D = {1: 256, 2: 128, 4: 64, 8: 32, 16: 32, 32: 32}
_BLOCK_P = {1: 16, 2: 16, 4: 16, 8: 16, 16: 8, 32: 4}
_BLOCK_C = {1: 128, 2: 32, 4: 32, 8: 32, 16: 32, 32: 64}
_GRAM_WARPS = {1: 1, 2: 1, 4: 1, 8: 1, 16: 1, 32: 4}
_WARPS = {1: 1, 2: 1, 4: 1, 8: 1, 16: 4, 32: 8}
_SCHEDULERS = 4  # of a multiprocessor; each has a warp of its own. Not tuned on a GPU yet.
_MAX_SCRATCH = 64 << 20  # bytes; large r uses fewer splits instead of more memory. Not tuned yet.


def build_config(layers: int, d: int, r: int, processors: int) -> BuildConfig:
    """Return the launch parameters of ``layers`` matrices ``[d, r]``.

    Args:
        layers: L.
        d: Number of rows of X.
        r: Rank.
        processors: Number of multiprocessors of the device.
    """
    tile = min(_MAX_TILE, common.next_power_of_2(r))
    padded = common.cdiv(r, tile) * tile
    block_c = _BLOCK_C[tile]
    chunks = common.cdiv(d, block_c)
    programs = processors * max(1, _SCHEDULERS // _WARPS[tile])
    scratch = 88 * padded**2 * max(layers, 1)  # bytes per split: 11 fp64 matrices
    splits = max(1, min(programs // max(layers, 1), chunks, _MAX_SCRATCH // scratch))
    chunk = common.cdiv(chunks, splits) * block_c
    return BuildConfig(
        tile=tile,
        padded=padded,
        rows=max(256, 16 * padded),  # the sums of all parts are smaller than a quarter of X
        block_d=_BLOCK_D[tile],
        block_p=_BLOCK_P[tile],
        # The minimum of tl.dot, which keeps this many values of each row in registers
        block_k=16 if r > 1 else 1,
        block_j=tile if r == 1 else max(4, tile),
        block_c=block_c,
        splits=common.cdiv(d, chunk),
        chunk=chunk,
        gram_warps=_GRAM_WARPS[tile],
        num_warps=_WARPS[tile],
        gram_stages=4 if tile <= 8 else 3,
        num_stages=3 if tile <= 8 else 2,
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 2 in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=1024)
def _bound(
    kernel: Any, config: BuildConfig, r: int, is_cayley: bool, device_type: str
) -> tuple[triton_launch.BoundKernel, triton_launch.BoundKernel]:
    """Return the first launch and the launch of ``kernel``."""
    options = common.compile_options(device_type)
    return (
        triton_launch.BoundKernel(
            gram_kernel,
            {"r": r, "CAYLEY": is_cayley, **config.gram_constexprs()},
            {"num_warps": config.gram_warps, "num_stages": config.gram_stages, **options},
        ),
        triton_launch.BoundKernel(
            kernel,
            {"r": r, "CAYLEY": is_cayley, **config.constexprs()},
            {"num_warps": config.num_warps, "num_stages": config.num_stages, **options},
        ),
    )


def launch(
    kernel: Any,
    X: Tensor,
    base: Tensor | None,
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    is_cayley: bool,
    args: tuple[Tensor | None, ...],
) -> None:
    """Launch the sums over d and then a kernel for X ``[L, d, r]``; ``args`` are its tensors."""
    layers, d, r = X.shape
    config = build_config(layers, d, r, processors(X.device))
    parts, tiles = common.cdiv(d, config.rows), config.padded // config.tile
    matrices, own = (1, 7) if base is None else (2, 11)
    scratch = X.new_empty(
        layers * (parts * matrices + config.splits * own) * config.padded**2, dtype=torch.float64
    )
    sums, build = _bound(kernel, config, r, is_cayley, X.device.type)
    triton_launch.launch(
        sums, (parts, matrices * tiles**2, layers), (X, base, grad_R, grad_D, scratch), (d,)
    )
    triton_launch.launch(build, (config.splits, layers), (*args, scratch), (d, r, config.chunk))
