"""Run a command with a deadline: its output in a log, its process group stopped in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

GRACE_SECONDS = 6.0  # between SIGTERM and SIGKILL
MOST_LOG_BYTES = 4 << 20
MOST_SHOWN_BYTES = 64 << 10  # at a time
STOPPED = -1  # the status of a command that was stopped


class Interrupted(Exception):
    """The pass itself received a signal."""


def _kill(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def stop(process: subprocess.Popen, grace: float = GRACE_SECONDS) -> None:
    """End a process group: SIGTERM, and SIGKILL for what is left after ``grace`` seconds."""
    _kill(process, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    _kill(process, signal.SIGKILL)  # children may outlive the first process
    process.wait()


def run(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: Mapping[str, str],
    cwd: Path,
    each_second: Callable[[], None] = lambda: None,
) -> int:
    """Run a command and print its output as it comes.

    The output goes to a file and not to a pipe, so that a child which keeps it open cannot block.

    Returns:
        The exit status, or ``STOPPED`` if the command was stopped after ``seconds``.

    Raises:
        Interrupted: The pass received a signal; the command has been stopped.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
    deadline, seen, ticked = time.monotonic() + seconds, log.stat().st_size, time.monotonic()
    with log.open("rb") as text:
        text.seek(seen)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
                _show(text)
                if log.stat().st_size - seen > MOST_LOG_BYTES:
                    print(f"stopped: more than {MOST_LOG_BYTES >> 10} KiB of output")
                    break
                if time.monotonic() - ticked >= 1:
                    ticked = time.monotonic()
                    each_second()
        finally:
            status = process.poll()
            stop(process)  # also what the command has left running
            _show(text)
            if log.stat().st_size > MOST_LOG_BYTES:
                os.truncate(log, MOST_LOG_BYTES)
    return STOPPED if status is None else status


def _show(text: BinaryIO) -> None:
    """Print what is new in a log, of much text the end."""
    new = os.fstat(text.fileno()).st_size - text.tell()
    if new > MOST_SHOWN_BYTES:
        text.seek(-MOST_SHOWN_BYTES, os.SEEK_END)
        print("[...]")
    if new > 0:
        print(text.read(MOST_SHOWN_BYTES).decode(errors="replace"), end="", flush=True)
