"""What a trial does while it trains: reports held-out values, and ends early when it is hopeless
or time is up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optuna import TrialPruned
from optuna.trial import Trial
from transformers import TrainerCallback

from reft_train.search.objective import Objective


class TimeUp(Exception):
    """The search's time is over."""


class Watch(TrainerCallback):
    """Tells optuna each held-out value, numbered from 1: batch sizes differ between trials, so
    steps could not be compared.
    """

    def __init__(
        self, trial: Trial, objective: Objective, deadline: float | None, clock: Callable[[], float]
    ) -> None:
        self.trial = trial
        self.objective = objective
        self.deadline = deadline
        self.clock = clock
        self.evaluations = 0

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report; raise TrialPruned when the pruner says so and there is still training to save."""
        value = self.objective.of(metrics or {})
        self.evaluations += 1
        self.trial.report(value, self.evaluations)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise TrialPruned(
                f"held-out {self.objective.name} {value:.4g} at evaluation {self.evaluations}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TimeUp after the deadline."""
        if self.deadline is not None and self.clock() >= self.deadline:
            raise TimeUp
