"""Trainer callbacks: a crash-safe log, clean interruption, and counters."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from reft_train.files import write_text

LOG = "log.jsonl"


class Journal(TrainerCallback):
    """Append each log entry to ``log.jsonl``; on resume, drop entries after the checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the file, or truncate it to the step that the run resumes from."""
        if state.is_world_process_zero:
            entries = [entry for entry in state.log_history if "train_runtime" not in entry]
            write_text(self.path, "".join(f"{json.dumps(entry)}\n" for entry in entries))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**logs, "step": state.global_step}) + "\n")


class Interrupt(TrainerCallback):
    """Handle Ctrl-C and SIGTERM.

    The first signal stops the run after the current step and saves a checkpoint; the second stops
    it immediately.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save and stop; all processes agree on the step."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.requested), device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = control.should_save or state.epoch != int(state.epoch)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Save after the evaluation if an epoch ends at this step; otherwise do nothing."""
        if self.requested and state.global_step < state.max_steps:
            control.should_save = state.epoch == int(state.epoch)
            control.should_evaluate = control.should_evaluate and control.should_save
        return control


class Bookkeeping(TrainerCallback):
    """Count and time optimizer steps for the trainer, and set the epoch of the sampler."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch on the sampler or stream.

        Engines do not reach it in a resumed run, where the data loader is wrapped twice.
        """
        trainer = self.trainer
        order = trainer.train_dataset if trainer.sampler is None else trainer.sampler
        order.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.loss_steps += 1
        self.trainer.step_ends.append(time.perf_counter())
