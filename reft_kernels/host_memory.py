"""Memory pool for large CPU outputs.

malloc obtains each block of 32 MiB or more from the operating system and returns it when freed. The
page faults of the first writes to such a block take several times as long as an edit (64 MiB cause
16,384 faults). The ``cpu`` backend therefore allocates out-of-place outputs of 16 MiB or more from
a pool that reuses freed blocks and requests huge pages. Other allocations do not use the pool.

The pool keeps up to ``REFT_KERNELS_HOST_POOL_MB`` MiB of free blocks (default 512); 0 disables it.
PyTorch's profiler does not report memory from the pool (use :func:`held`), and ``resize_`` cannot
enlarge a tensor allocated from it.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels import dispatch

SMALLEST_BYTES = 16 << 20  # malloc reuses smaller blocks without new page faults
VARIABLE = "REFT_KERNELS_HOST_POOL_MB"
_DEFAULT_MIB = 512

_limit: int | None = None  # MiB; None until the environment variable has been read


class Held(NamedTuple):
    """Size of the pool in bytes: ``used`` by live tensors, ``kept`` in free blocks."""

    used: int
    kept: int


def limit() -> int:
    """Return how many MiB of free blocks the pool may keep.

    This is the value last passed to :func:`set_limit`, else ``REFT_KERNELS_HOST_POOL_MB``, else
    512.

    Raises:
        ValueError: If ``REFT_KERNELS_HOST_POOL_MB`` is not a non-negative integer.
    """
    global _limit
    if _limit is None:
        text = os.environ.get(VARIABLE) or str(_DEFAULT_MIB)
        if not text.isdecimal():
            raise ValueError(
                f"{VARIABLE}: got {text!r}, expected a whole number of MiB, zero or more"
            )
        _limit = int(text)
    return _limit


def set_limit(mib: int) -> None:
    """Set how many MiB of free blocks the pool may keep.

    Args:
        mib: The limit in MiB. With 0, outputs are allocated by PyTorch instead.

    Raises:
        ValueError: If ``mib`` is negative.
    """
    global _limit
    if mib < 0:
        raise ValueError(f"mib: got {mib}, expected zero or more")
    _limit = mib
    if _native.cache_info().currsize:
        _native().set_pool_limit(mib << 20)


@functools.cache
def _native():
    """Return the pool's operators; the first call sets the pool's limit."""
    torch.ops.reft_kernels_cpu.set_pool_limit(limit() << 20)
    return torch.ops.reft_kernels_cpu


def start() -> None:
    """Tell the native library its pool's limit: its operators take large outputs from the pool
    themselves.
    """
    _native()


def _serves(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.nbytes < SMALLEST_BYTES or limit() == 0:
        return False
    return dispatch.choose("edit", "cpu", tensor.dtype)[0] == "cpu"


def empty_like(tensor: Tensor) -> Tensor:
    """Return an uninitialized, contiguous tensor with the shape, dtype and device of ``tensor``.

    It is allocated from the pool if it is at least :data:`SMALLEST_BYTES` large, on the CPU, and
    the ``cpu`` backend serves its dtype.
    """
    if _serves(tensor):
        return _native().pooled_like.default(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def held() -> Held:
    """Return the current size of the pool."""
    return Held(*_native().held_by_pool()) if _native.cache_info().currsize else Held(0, 0)


def release() -> None:
    """Return the pool's free blocks to the operating system; the limit stays the same."""
    mib = limit()
    set_limit(0)
    set_limit(mib)
