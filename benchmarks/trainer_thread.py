"""A thread that runs one optimizer step of a transformers Trainer per call.

Other tasks can run on the same thread between steps. OpenMP keeps a thread pool per thread that
computes. Two pools have more threads than there are cores, which makes both slow: a small matrix
product takes twice as long. All compared work therefore runs on this thread, and the calling
thread releases its own pool first.
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

from benchmarks.protocol import ProviderUnavailable

_SOFT = 1  # omp_pause_soft: thread-local data may be discarded
SHUTDOWN_SECONDS = 60


def release_threads() -> None:
    """Release the OpenMP pool of the calling thread. Its next parallel operation creates a new one.

    Raises:
        ProviderUnavailable: If the OpenMP library is not found or cannot release the pool.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is None or pause(_SOFT):
        raise ProviderUnavailable("OpenMP cannot release the threads of the calling thread")


class TrainerThread(TrainerCallback):
    """Run submitted tasks and training steps on a dedicated thread.

    The thread starts with the first task, and again with the first task after :meth:`close`.

    Args:
        make: Returns a context manager that yields a Trainer whose last callback is this object. It
            is entered on the thread, for the first step.
        releases: Whether the thread releases its OpenMP pool after each step, so that several such
            threads can take turns. This is worth it for steps of a second.
    """

    def __init__(
        self,
        make: Callable[[TrainerThread], AbstractContextManager[Any]],
        *,
        releases: bool = False,
    ) -> None:
        self._make = make
        self._releases = releases
        self._thread: threading.Thread | None = None

    # called from other threads

    def run_task(self, task: Callable[[], Any]) -> Any:
        """Run a task on the thread and return its result, or raise its exception."""
        return self._submit(task)

    def step(self) -> None:
        """Run one optimizer step.

        A step lasts from the end of the previous step, or the start of training, to its own end.

        Raises:
            RuntimeError: If training has ended. Exceptions of the Trainer are raised as they are.
        """
        self._submit(None)

    def close(self) -> None:
        """End training after the current step, and the thread.

        Raises:
            RuntimeError: If the thread does not end in time.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._tasks.put(None)
        thread.join(SHUTDOWN_SECONDS)
        if thread.is_alive():
            raise RuntimeError(f"training did not end within {SHUTDOWN_SECONDS} s")

    def _submit(self, task: Callable[[], Any] | None) -> Any:
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
        # a daemon thread, so that a Trainer that hangs does not block the exit of the process
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), daemon=True, name="trainer_thread"
        )
        self._thread.start()

    # called on the trainer thread

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
                    f"training ended after {trainer.state.global_step} steps, expected more"
                )
            except BaseException as error:
                self._answers.put((None, error))
                self._serve()

    def _serve(self) -> None:
        """Run tasks until a step is requested or the thread is closed."""
        while (task := self._tasks.get()) is not None:
            try:
                answer = task(), None
            except BaseException as error:
                answer = None, error
            self._answers.put(answer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Report that the step has ended and wait for the next request."""
        if self._releases and torch.get_num_threads() > 1:
            release_threads()
        self._answers.put((None, None))
        self._serve()
        control.should_training_stop = control.should_training_stop or self._stopping
        return control
