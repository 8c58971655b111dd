"""A thread in which transformers' Trainer takes one optimizer step a call, and other work is done
between its steps.

OpenMP keeps a pool for every thread that computes. Two of them want more threads than there are
cores, and so both wait for
their threads slowly: a small matrix product takes twice as long. So all that is compared is done on
the trainer_thread, and the calling thread gives its own pool up first.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.harness import Absent

_SOFT = 1  # omp_pause_soft: data of threads need not be kept
SHUTDOWN_SECONDS = 60


def release_threads() -> None:
    """Give up the calling thread's OpenMP pool; its next parallel work makes a new one.

    Raises:
        Absent: OpenMP's library cannot, or cannot be found.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is None or pause(_SOFT):
        raise Absent("OpenMP cannot give up the threads of the calling thread")


class TrainerThread(TrainerCallback):
    """Does what it is told in a thread of its own, which begins with the first task and again after
    :meth:`close`.

    Args:
        make: a context that gives a Trainer which has this as its last callback; entered on the
            trainer_thread, for the first step.
    """

    def __init__(self, make: Callable[[TrainerThread], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._thread: threading.Thread | None = None

    # ---- called by others

    def do(self, task: Callable[[], Any]) -> Any:
        """The task's result; what it raises is raised here."""
        return self._ask(task)

    def step(self) -> None:
        """From the end of one optimizer step, or the beginning of the training, to the end of the
        next.

        Raises:
            RuntimeError: the training is over. Otherwise what the Trainer raises.
        """
        self._ask(None)

    def close(self) -> None:
        """End the training after its present step, and the thread.

        Raises:
            RuntimeError: it does not end.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._tasks.put(None)
        thread.join(SHUTDOWN_SECONDS)
        if thread.is_alive():
            raise RuntimeError(f"the training did not end within {SHUTDOWN_SECONDS} s")

    def _ask(self, task: Callable[[], Any] | None) -> Any:
        if self._thread is None:
            self._begin()
        self._tasks.put(task)
        result, error = self._answers.get()
        if error is not None:
            raise error
        return result

    def _begin(self) -> None:
        if torch.get_num_threads() > 1:
            release_threads()
        self._stopping = False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        # a daemon: a Trainer that hangs must not keep the process
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), daemon=True, name="trainer_thread"
        )
        self._thread.start()

    # ---- on the trainer_thread

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._serve()
        while not self._stopping:
            try:
                with self._make(self) as trainer:
                    trainer.train()
                if self._stopping:
                    return
                raise RuntimeError(
                    f"the training was over after {trainer.state.global_step} steps, expected more"
                )
            except BaseException as error:
                self._answers.put((None, error))
                self._serve()

    def _serve(self) -> None:
        """Do tasks until a step is wanted, or the end."""
        while (task := self._tasks.get()) is not None:
            try:
                answer = task(), None
            except BaseException as error:
                answer = None, error
            self._answers.put(answer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Say that the step is over and wait for the next to be wanted."""
        self._answers.put((None, None))
        self._serve()
        control.should_training_stop = control.should_training_stop or self._stopping
        return control
