"""Checks of tensor values that never synchronise: at once on a CPU, one forward later on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredChecks:
    """Conditions on values that a batch must not meet.

    On a CPU the error is raised at once. On a GPU the flag is copied to the host asynchronously and
    read by :meth:`poll`, which
    every forward begins with, once the copy is there: the error comes a step late, and no step
    waits for it. Under ``torch.compile`` a CPU graph asserts; a GPU graph does not check, since a
    failed device-side assertion ends the process.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Any, str]] = []

    def __getstate__(self) -> dict:
        return {"_waiting": []}

    def refuse(self, flag: Tensor, message: str) -> None:
        """Raise ``ValueError(message)`` if the bool scalar ``flag`` is true."""
        if torch.compiler.is_compiling():
            if flag.device.type == "cpu":
                torch._assert_async(torch.logical_not(flag), message)
        elif flag.device.type == "cpu":
            if bool(flag):
                raise ValueError(message)
        elif flag.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(flag, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._waiting.append((host, copied, message))

    def poll(self) -> None:
        """Raise what has been found since.

        Raises:
            ValueError: an earlier batch met a refused condition.
        """
        waiting, self._waiting = self._waiting, []
        for index, (host, copied, message) in enumerate(waiting):
            if not copied.query():
                self._waiting += waiting[index:]
                return
            if bool(host):
                raise ValueError(f"{message} (found in an earlier batch)")
