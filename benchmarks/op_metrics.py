"""Metrics of a call besides its time: launches and peak memory."""

from __future__ import annotations

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.protocol import Call
from reft_kernels import host_memory

_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class _Operators(TorchDispatchMode):
    """Count dispatched operators, except views and bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in _FREE and not func.is_view:
            self.count += 1
        return func(*args, **(kwargs or {}))


def launches(call: Call, device: str) -> int:
    """Count the launches of a call.

    Returns:
        On a GPU the number of kernels, copies and fills. On a CPU the number of operators, except
        views and bare allocations.
    """
    with call.context():
        prepared = call.before()
        if device == "cpu":
            with _Operators() as operators:
                call.run(prepared)
            return operators.count
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call.run(prepared)
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profile.events())


def peak_bytes(call: Call, device: str) -> int:
    """Return the peak of memory that a call allocates, above the memory held before it."""
    with call.context():
        prepared = call.before()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call.run(prepared)
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        pool = host_memory.limit()
        host_memory.set_limit(0)  # the profiler does not record allocations from this pool
        try:
            with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profile:
                kept = call.run(prepared)
        finally:
            host_memory.set_limit(pool)
    held = most = 0
    for event in sorted(profile.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    del kept
    return most
