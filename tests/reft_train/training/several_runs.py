"""A program for launchers: trainings one after another in the same processes, since starting those
takes longer.

Its argument is a JSON file, a list of settings. ``interrupt_at`` in them: Ctrl-C reaches the first
process in that step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import transformers
from reft_train.config import build
from reft_train.ranks import leave
from reft_train.training.session import train


class CtrlC(transformers.TrainerCallback):
    """Sends this process what Ctrl-C sends."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def main(path: str) -> None:
    for settings in json.loads(Path(path).read_text()):
        step = settings.pop("interrupt_at", None)
        train(build(settings), callbacks=[] if step is None else [CtrlC(step)])
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
