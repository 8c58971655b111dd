"""Deterministic sums over chunks of rows.

Each chunk stores its fp32 partial sums, and they are added in the order of the chunks, so that the
result does not depend on when a program runs. Two ways to add them:

- in the launch that computes them, by the program of a tile that finishes last. An atomic counter
  determines which one it is. The counters are part of the call's own workspace, and an earlier
  launch of the same call sets them to zero: no state outlives a call, none is shared between CUDA
  graphs or streams, and a graph that is replayed always finds zeros.
- in a launch of its own, which needs neither counters nor atomics. It is used where there is no
  earlier launch (RED) and on AMD GPUs: there a barrier does not wait for the stores of other
  waves, so that a counter could be ahead of the partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


def round_up(count: int) -> int:
    """Return count rounded up to a multiple of 16, as :func:`padded` does in kernels."""
    return (count + 15) // 16 * 16


@triton.jit
def padded(count):
    """Return count rounded up to a multiple of 16, so that what follows it stays aligned."""
    return (count + 15) // 16 * 16


@triton.jit
def is_last(counter, chunks):
    """Return whether this is the last of ``chunks`` programs to reach this point.

    The preceding stores of the other programs are then visible to this program. This holds on
    NVIDIA GPUs, where the barrier orders the stores of all warps before the releasing atomic.
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
