"""Tests of the thread that runs one optimizer step per call."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks import trainer_thread
from benchmarks.trainer_thread import TrainerThread


class _Training:
    """A minimal Trainer.

    Args:
        last: Number of steps.
        fails: Step that raises, or 0.
    """

    def __init__(self, last: int = 100, fails: int = 0) -> None:
        self.last, self.fails = last, fails
        self.state, self.begun, self.ended = SimpleNamespace(global_step=0), 0, 0
        self.seen: list[tuple[threading.Thread, int]] = []
        self.trainer_thread = TrainerThread(self._context)

    @contextlib.contextmanager
    def _context(self, callback):
        self.begun += 1
        self.callback = callback
        try:
            yield self
        finally:
            self.ended += 1

    def train(self) -> None:
        control = SimpleNamespace(should_training_stop=False)
        while self.state.global_step < self.last and not control.should_training_stop:
            self.state.global_step += 1
            if self.state.global_step == self.fails:
                raise FloatingPointError("the loss is nan")
            self.seen.append((threading.current_thread(), torch.get_num_threads()))
            self.callback.on_step_end(None, self.state, control)


@pytest.fixture
def training():
    training = _Training()
    yield training
    training.trainer_thread.close()


def test_a_call_is_one_step(training):
    counts = []
    for _ in range(3):
        training.trainer_thread.step()
        counts.append(training.state.global_step)
    assert counts == [1, 2, 3] and training.begun == 1


def test_tasks_and_steps_share_a_thread_with_the_callers_number_of_threads(training):
    task = lambda: (threading.current_thread(), torch.get_num_threads())  # noqa: E731
    before = training.trainer_thread.run_task(task)
    training.trainer_thread.step()
    assert {before, training.trainer_thread.run_task(task), *training.seen} == {before}
    assert before[0] is not threading.current_thread() and before[1] == torch.get_num_threads()


def test_closing_ends_training_and_thread_and_a_step_begins_anew(training):
    training.trainer_thread.step()
    thread = training.seen[0][0]
    training.trainer_thread.close()
    assert not thread.is_alive() and (
        training.begun,
        training.ended,
        training.state.global_step,
    ) == (1, 1, 1)
    training.trainer_thread.step()
    assert training.begun == 2


def test_closing_without_a_training_begins_none(training):
    training.trainer_thread.run_task(int)
    training.trainer_thread.close()
    training.trainer_thread.close()
    assert training.begun == 0


def test_a_failing_task_does_not_end_the_training(training):
    training.trainer_thread.step()
    with pytest.raises(ZeroDivisionError):
        training.trainer_thread.run_task(lambda: 1 / 0)
    training.trainer_thread.step()
    assert training.begun == 1 and training.state.global_step == 2


def test_what_the_training_raises_is_raised_by_the_step():
    training = _Training(fails=2)
    training.trainer_thread.step()
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        training.trainer_thread.step()
    assert training.ended == 1
    training.trainer_thread.close()


def test_a_step_after_the_end_of_training_raises():
    training = _Training(last=1)
    training.trainer_thread.step()
    with pytest.raises(RuntimeError, match="ended after 1 steps"):
        training.trainer_thread.step()
    training.trainer_thread.close()


def test_the_pool_is_released_after_each_step_if_asked_for(monkeypatch):
    released = []
    monkeypatch.setattr(trainer_thread, "release_threads", lambda: released.append(1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for releases in (False, True):
        training = _Training()
        training.trainer_thread = TrainerThread(training._context, releases=releases)
        for _ in range(3):
            training.trainer_thread.step()
        training.trainer_thread.close()
        # once by the calling thread, which starts the other one
        assert len(released) == (4 if releases else 1)
        released.clear()
