"""Comparisons for tests: three methods, a learning rate to choose, and tested runs that take no
time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from reft_train.compare import Comparison, ComparisonPlan, compare
from reft_train.config import RunConfig
from reft_train.search.study import Objective
from reft_train.training.outcome import Outcome

from tests.reft_train.fake_training import FakeTrain, finished, quality
from tests.reft_train.search.plans import config, silent

METHODS = ("loreft", "lora", "ia3")
SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True)}


class FakeFinal:
    """A tested run, better by a hundredth with each seed above 42; ``seen`` are its settings.

    Args:
        failing: (method, seed) pairs that fail. interrupted: number of the call in which Ctrl-C
            comes.
    """

    def __init__(
        self, failing: tuple[tuple[str, int], ...] = (), interrupted: int | None = None
    ) -> None:
        self.failing, self.interrupted = failing, interrupted
        self.seen: list[RunConfig] = []

    def __call__(self, config: RunConfig) -> Outcome:
        self.seen.append(config)
        if len(self.seen) - 1 == self.interrupted:
            raise KeyboardInterrupt
        if (config.method, config.seed) in self.failing:
            raise RuntimeError("out of memory")
        outcome = finished(config, quality(config) + (config.seed - 42) / 100)
        outcome.save(Path(config.output))
        return outcome


def plan(folder: Path, **fields: Any) -> ComparisonPlan:
    """Three methods, two trials, two seeds, in ``folder``."""
    values = {
        "methods": METHODS,
        "objective": Objective("accuracy"),
        "seeds": (42, 43),
        "trials": 2,
        **fields,
    }
    return ComparisonPlan(config(folder), **values)


def run(plan: ComparisonPlan, train: Any = None, final: Any = None) -> Comparison:
    """The comparison with fakes in place of trainings."""
    spaces = dict.fromkeys(plan.methods, SPACE)
    return compare(plan, spaces, train or FakeTrain(), final or FakeFinal(), silent)
