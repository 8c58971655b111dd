"""Timing of optimizer steps without synchronizing the GPU in each step."""

from __future__ import annotations

import statistics
import time

import torch


class StepClock:
    """Step timer that measures each step between ``begin()`` and ``end()``.

    ``settle()`` is called after a device synchronization. On CUDA a step is timed by two events on
    its stream, on the CPU by a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: float | torch.cuda.Event | None = None
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: list[float] = []

    def _now(self) -> float | torch.cuda.Event:
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
        if begun is not None and self._cuda:
            self._open.append((begun, self._now()))
        elif begun is not None:
            self._seconds.append(self._now() - begun)

    def settle(self) -> None:
        """Read the events of finished steps."""
        self._seconds += [begun.elapsed_time(ended) / 1e3 for begun, ended in self._open]
        self._open.clear()

    def median(self) -> float:
        """Return the median step time in seconds, 0 without steps. Synchronizes the device."""
        if self._open:
            self._open[-1][1].synchronize()
            self.settle()
        return statistics.median(self._seconds) if self._seconds else 0.0
