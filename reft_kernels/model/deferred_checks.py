"""Checks of tensor values without synchronization: immediate on CPU, deferred on GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredChecks:
    """Raises if a bool tensor is true, without blocking on an accelerator.

    On CPU the error is raised immediately. On GPU the flag is copied to the host asynchronously,
    and :meth:`poll`, called at the start of every forward, raises once the copy has finished; the
    error refers to an earlier batch. Under ``torch.compile``, a CPU graph contains an assertion; a
    GPU graph has no check, because a failed device-side assertion makes the process unusable.
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
        """Raise the first error of an earlier batch whose flag has reached the host.

        Raises:
            ValueError: a flag of an earlier batch was true.
        """
        waiting, self._waiting = self._waiting, []
        for index, (host, copied, message) in enumerate(waiting):
            if not copied.query():
                self._waiting += waiting[index:]
                return
            if bool(host):
                raise ValueError(f"{message} (found in an earlier batch)")
