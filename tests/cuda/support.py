"""What the tests of the CUDA kernels share: the device, the marks, launches and thread orders."""

from __future__ import annotations

import pytest
import torch

from reft_kernels import cuda

EMULATED = cuda.emulated()
DEVICE = "cpu" if EMULATED else "cuda"
_WHY_NOT = (
    cuda.unsupported_reason("edit", DEVICE, torch.float32)
    if EMULATED or torch.cuda.is_available()
    else "needs a CUDA GPU"
)
MARKS = [
    pytest.mark.kernels,
    *([] if EMULATED else [pytest.mark.gpu]),
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
    pytest.mark.usefixtures("poison", "cuda_backend"),
]
gpu_alone = pytest.mark.skipif(EMULATED, reason="needs a CUDA GPU")
emulation_alone = pytest.mark.skipif(
    not EMULATED, reason="needs the emulation, which chooses the order of the threads"
)


def kernels(function) -> int:
    """Return the number of kernels of this backend that ``function`` launches."""
    function()
    if EMULATED:
        before = torch.ops.reft_kernels_cuda.launches()
        function()
        return torch.ops.reft_kernels_cuda.launches() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum("reft_cuda" in event.name for event in profile.events())


def in_each_order(function) -> list:
    """Return the results of ``function`` with emulated threads in each order."""
    results = []
    try:
        for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
            torch.ops.reft_kernels_cuda.schedule(order, seed)
            results.append(function())
    finally:
        torch.ops.reft_kernels_cuda.schedule("forward", 0)
    return results
