"""End a run early without losing what it has measured.

A time limit, SIGTERM or a failed device request the end of the run. The harness asks
:func:`requested` between providers and between rounds, and returns the rows that it has by then.
"""

from __future__ import annotations

import signal
import time

DEVICE_FAILED = 3  # exit status of a run whose device no longer works
CUT_OFF = 4  # exit status of a run that ended before its last case

_deadline: float | None = None
_reason = ""
_device_failed = False


def install(seconds: float | None = None) -> None:
    """Handle SIGTERM, and request the end of the run ``seconds`` from now."""
    global _deadline
    reset()
    _deadline = None if seconds is None else time.monotonic() + seconds
    signal.signal(signal.SIGTERM, lambda *_: request("SIGTERM"))


def reset() -> None:
    """Withdraw every request."""
    global _deadline, _reason, _device_failed
    _deadline, _reason, _device_failed = None, "", False


def request(reason: str) -> None:
    """Request the end of the run."""
    global _reason
    _reason = _reason or reason


def device_failed(error: BaseException) -> None:
    """Request the end of the run because no further call can run on the device."""
    global _device_failed
    _device_failed = True
    request(f"the device failed: {type(error).__name__}")


def requested() -> str:
    """Return why the run should end, or an empty string."""
    if not _reason and _deadline is not None and time.monotonic() >= _deadline:
        request("the time limit was reached")
    return _reason


def device_works() -> bool:
    """Return whether no call has broken the device."""
    return not _device_failed


def status() -> int:
    """Return the exit status of a run that ended early."""
    return DEVICE_FAILED if _device_failed else CUT_OFF
