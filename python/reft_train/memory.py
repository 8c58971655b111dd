"""Peak memory measurement, with a description of what was measured.

On CUDA this is the allocator's peak. On the CPU it is the process's peak resident set (``VmHWM``),
reset at the start. ``ru_maxrss`` is not used: on Linux it cannot be reset, and a child process
inherits its parent's value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Memory before the work and at its peak in MiB, and how it was measured."""

    before: float
    peak: float
    method: str


class PeakMeter:
    """Peak memory meter: call ``start()`` before the work and ``stop()`` after it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before, self._method = device, 0.0, ""

    def start(self) -> None:
        """Reset the peak if the system supports it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device) / _MIB
            self._method = "peak of PyTorch's CUDA allocator during training"
            return
        self._before = psutil.Process().memory_info().rss / _MIB
        try:
            # writing 5 resets VmHWM to the current size
            Path("/proc/self/clear_refs").write_text("5")
            self._method = "peak resident memory of the process during training (VmHWM)"
        except OSError:
            self._method = "peak resident memory of the process since its start"

    def stop(self) -> Peak:
        """Return the peak since ``start()``."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            return Peak(self._before, peak / _MIB, self._method)
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return Peak(self._before, int(found[1]) / 1024, self._method)
