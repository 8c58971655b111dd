"""The time of optimizer steps, without waiting for a GPU in each of them."""

from __future__ import annotations

import statistics
import time

import torch


class StepClock:
    """``begin()`` and ``end()`` around each step; ``settle()`` where the device has been waited
    for.

    On CUDA a step is the time between two events on its stream, on the CPU that between two calls.
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
        """A step begins; further calls before its end change nothing."""
        if self._begun is None:
            self._begun = self._now()

    def end(self) -> None:
        """The step ends; without a beginning there is none."""
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
        """Median seconds of a step; 0 when there was none. Waits for the device."""
        if self._open:
            self._open[-1][1].synchronize()
            self.settle()
        return statistics.median(self._seconds) if self._seconds else 0.0
