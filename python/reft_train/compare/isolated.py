"""One tested run in a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from reft_train.children import environment
from reft_train.config import RunConfig, dump_yaml
from reft_train.files import write_text
from reft_train.training.outcome import Outcome


class RunFailed(Exception):
    """The process ended without a result; the message is its last words."""


def run_isolated(config: RunConfig) -> Outcome:
    """``reft-train run`` with these settings; what it prints goes to a ``.log`` file beside its
    folder.

    Raises:
        RunFailed: it failed. KeyboardInterrupt: it was interrupted.
    """
    output = Path(config.output)
    plan = write_text(output.with_name(f"{output.name}.yaml"), dump_yaml(config))
    log = output.with_name(f"{output.name}.log")
    command = [sys.executable, "-m", "reft_train", "run", "--config", str(plan)]
    with log.open("wb") as file:
        code = subprocess.run(
            command, env=environment(), stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunFailed(
            f"{words[-1][:300] if words else 'no output'} (exit code {code}, see {log})"
        )
    return Outcome.load(output)
