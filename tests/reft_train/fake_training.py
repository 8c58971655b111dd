"""A training that takes no time: its held-out values are a function of the settings, its
callbacks and files are real.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from reft_train.config import RunConfig
from reft_train.files import write_text
from reft_train.memory import Peak
from reft_train.training.outcome import Outcome


def quality(config: RunConfig) -> float:
    """Between 0 and 1, best at a learning rate of 1e-3, and better with more rank."""
    return 1 / (1 + (math.log10(config.lr) + 3) ** 2) * (1 - 0.5 / config.rank)


class FakeTrain:
    """``train(config, callbacks=...)``; ``seen`` are the settings that it was called
    with.

    Args:
        quality: held-out accuracy at the end; the loss is 1 - accuracy. evaluations: steps, each
            with an evaluation.
        before: called with the settings and the number of the call, from 0, before anything else;
            may raise.
    """

    def __init__(
        self,
        quality: Callable[[RunConfig], float] = quality,
        evaluations: int = 3,
        before: Callable[[RunConfig, int], None] = lambda config, call: None,
    ) -> None:
        self.quality, self.evaluations, self.before = quality, evaluations, before
        self.seen: list[RunConfig] = []
        self.steps = 0

    def __call__(self, config: RunConfig, *, callbacks: Any = ()) -> Outcome:
        self.seen.append(config)
        folder = Path(config.output)
        for name in ("checkpoint-1", "adapter"):
            write_text(folder / name / "weights", "")
        self.before(config, len(self.seen) - 1)
        end = self.quality(config)
        for step in range(1, self.evaluations + 1):
            self.steps += 1
            state = SimpleNamespace(global_step=step, max_steps=self.evaluations)
            value = end * (step / self.evaluations)
            metrics = {"eval_accuracy": value, "eval_exact_match": value, "eval_loss": 1 - value}
            for callback in callbacks:
                callback.on_evaluate(None, state, None, metrics=metrics)
        outcome = finished(config, end)
        outcome.save(folder)
        return outcome


def finished(config: RunConfig, value: float = 0.5, **changes: Any) -> Outcome:
    """The outcome of a run with a held-out accuracy of ``value``; its test accuracy is lower by
    a tenth.
    """
    fields = {
        "config": config.model_dump(),
        "trainable": 100 * config.rank,
        "head": 0,
        "total": 10_000,
        "steps": 3,
        "losses": [],
        "seconds": 1.0,
        "step_seconds": 0.25,
        "tokens_per_second": 100.0,
        "memory": Peak(10.0, 20.0, "as a test says"),
        "validation": {"loss": 1 - value, "accuracy": value, "exact_match": value},
        "tests": {}
        if config.skip_test
        else {"test": {"accuracy": value - 0.1, "exact_match": value - 0.1}},
    }
    return Outcome(**{**fields, **changes})
