"""Memory of large outputs on the CPU: kept when a tensor lets go of it, and given to the next
output.

malloc maps every block of 32 MiB and more anew; the page faults of its first writes take several
times as long as an edit (64 MiB: 16,384 faults). The ``cpu`` backend therefore takes outputs of 16
MiB and more from a pool of its own, in huge pages
where the system grants them. Only what an operator of this package returns out of place comes from
it: an edit in place allocates nothing.

At most ``REFT_KERNELS_HOST_POOL_MB`` MiB (512 unless it is set) of blocks that no tensor holds are
kept; with 0 there is no pool. PyTorch's profiler does not see what comes from it (:func:`held`
does), and such a tensor cannot grow by ``resize_``.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels import dispatch

SMALLEST_BYTES = 16 << 20  # malloc keeps and reuses smaller blocks itself
VARIABLE = "REFT_KERNELS_HOST_POOL_MB"
_DEFAULT_MIB = 512

_limit: int | None = None  # MiB; None: not asked for yet


class Held(NamedTuple):
    """Bytes of the pool: ``used`` by tensors, ``kept`` for the next ones."""

    used: int
    kept: int


def limit() -> int:
    """How much the pool may keep, in MiB: what :func:`set_limit` said last, else the environment.

    Raises:
        ValueError: ``REFT_KERNELS_HOST_POOL_MB`` is not a whole number of MiB, zero or more.
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
    """Change how much the pool may keep; with 0 outputs come from PyTorch's own allocator again.

    Raises:
        ValueError: ``mib`` is negative.
    """
    global _limit
    if mib < 0:
        raise ValueError(f"mib: got {mib}, expected zero or more")
    _limit = mib
    if _native.cache_info().currsize:
        _native().set_pool_limit(mib << 20)


@functools.cache
def _native():
    """The pool's operators, once the library that has it is loaded."""
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
    """Uninitialised and contiguous, of ``tensor``'s shape, dtype and device; from the pool where
    it is large and ours.
    """
    if _serves(tensor):
        return _native().pooled_like.default(tensor)
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def held() -> Held:
    """What the pool holds now."""
    return Held(*_native().held_by_pool()) if _native.cache_info().currsize else Held(0, 0)


def release() -> None:
    """Give what no tensor uses back to the system; later outputs fill the pool again."""
    kept = limit()
    set_limit(0)
    set_limit(kept)
