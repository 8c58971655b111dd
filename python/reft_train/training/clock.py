"""Timing of optimizer steps without synchronizing the GPU in each step."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


class StepClock:
    """Step timer that measures each step between ``begin()`` and ``end()``.

    On CUDA a step is timed by two events on its stream, on the CPU by a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: Any = None
        self._steps: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """Start timing a step; repeated calls before ``end()`` are ignored."""
        if self._begun is None:
            self._begun = self._now()

    def end(self) -> None:
        """Stop timing the step; ignored if no step was started."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._steps.append((begun, self._now()))

    def median(self) -> float:
        """Return the median step time in seconds, 0 without steps. Synchronizes the device."""
        if not self._steps:
            return 0.0
        if not self._cuda:
            return statistics.median(ended - begun for begun, ended in self._steps)
        self._steps[-1][1].synchronize()
        return statistics.median(begun.elapsed_time(ended) / 1e3 for begun, ended in self._steps)
