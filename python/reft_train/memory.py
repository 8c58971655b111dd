"""Peak memory measurement, with a description of what was measured.

On CUDA this is the allocator's peak. On the CPU it is the process's peak resident set (``VmHWM``),
reset at the start. ``ru_maxrss`` is not used: on Linux it cannot be reset, and a child process
inherits its parent's value.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from reft_train.procfs import STATUS, sizes

_MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Memory before the work and at its peak in MiB (0 where unknown), and how it was measured."""

    before: float
    peak: float
    method: str


def _max_rss_mib() -> float:
    try:
        import resource
    except ImportError:  # not available on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        _MIB if sys.platform == "darwin" else 1024
    )


class PeakMeter:
    """Peak memory meter: call ``start()`` before the work and ``stop()`` after it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before, self._method = device, 0.0, ""

    def start(self) -> None:
        """Reset the peak, where the system supports it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device) / _MIB
            self._method = "peak of PyTorch's CUDA allocator while training"
            return
        self._before, self._method = (
            sizes(STATUS).get("VmRSS", 0) / _MIB,
            "peak resident memory of the ",
        )
        try:
            # writing 5 resets VmHWM to the current size
            Path("/proc/self/clear_refs").write_text("5")
            self._method += "variant's process while training (VmHWM, reset before it)"
        except OSError:
            self._method += "variant's process since its start (VmHWM)"

    def stop(self) -> Peak:
        """Return the peak since ``start()``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return Peak(
                self._before, torch.cuda.max_memory_allocated(self.device) / _MIB, self._method
            )
        high_water = sizes(STATUS).get("VmHWM")
        if high_water is None:
            return Peak(
                self._before,
                _max_rss_mib(),
                "peak resident memory of the process since its start (ru_maxrss)",
            )
        return Peak(self._before, high_water / _MIB, self._method)
