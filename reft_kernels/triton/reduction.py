"""A sum over chunks of rows in a fixed order, within the launch that made the partials.

Programs of one output tile write fp32 partials, one a chunk; the program that finishes last, found
by an integer counter, adds
them in chunk order. Which program that is varies, the order of the additions does not: the result
is deterministic. The counter is reset by the same program, so that no launch is spent on clearing
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(like: Tensor, count: int) -> Tensor:
    """At least ``count`` int32 zeros, saved_input for each device and stream, since launches of
    one stream do not overlap.
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
    """True in the last of ``chunks`` programs to arrive; every earlier store of all of them is
    visible then.
    """
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == chunks - 1


@triton.jit
def sum_chunks(partials, offsets, mask, chunk_stride, chunks):
    """sum_c partials[c], added in the order of c."""
    # .cg: from L2, where the other programs' stores are, not from a stale line of L1
    total = tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    for c in range(1, chunks):
        part = partials + tl.cast(c, tl.int64) * chunk_stride
        total += tl.load(part + offsets, mask=mask, other=0.0, cache_modifier=".cg")
    return total
