"""Deterministic sum over chunks of rows, within the launch that computes the partial sums.

For each output tile, one program per chunk stores an fp32 partial sum. The program that finishes
last, determined by an atomic counter, adds the partial sums in the order of the chunks, so the
result does not depend on which program it is. It then resets the counter, so no separate launch is
needed for that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(like: Tensor, count: int) -> Tensor:
    """Return a tensor of at least ``count`` int32 zeros on the device of ``like``.

    There is one such tensor per device and stream, since launches on a stream do not overlap.
    """
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    key = (like.device, stream)
    buffer = _counters.get(key)
    if buffer is None or buffer.numel() < count:
        buffer = _counters[key] = torch.zeros(
            max(count, 4096), dtype=torch.int32, device=like.device
        )
    return buffer


@triton.jit
def is_last(counter, chunks):
    """Return whether this is the last of ``chunks`` programs to reach this point.

    The preceding stores of the other programs are then visible to this program.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == chunks - 1


@triton.jit
def sum_chunks(partials, offsets, mask, chunk_stride, chunks):
    """Return the sum of partials[c] over c, added in the order of c."""
    # .cg reads from L2, since L1 may hold stale values
    total = tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for c in range(1, chunks):
        part = partials + tl.cast(c, tl.int64) * chunk_stride
        total += tl.load(part + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return total
