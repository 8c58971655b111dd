"""Objective of a search: a metric on held-out training rows, never on a test set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from reft_train import tasks
from reft_train.config import RunConfig
from reft_train.errors import UserError

LOSS = "loss"


@dataclass(frozen=True)
class Objective:
    """The held-out metric ``name``."""

    name: str

    @property
    def direction(self) -> str:
        """``minimize`` for a loss, ``maximize`` for every other metric."""
        return "minimize" if self.name in (LOSS, "perplexity") else "maximize"

    def best(self, values: Mapping[int, float]) -> int | None:
        """Return the key of the best value (the first one on ties), or None without values."""
        sign = 1 if self.direction == "minimize" else -1
        return min(values, key=lambda key: (sign * values[key], key), default=None)

    def of(self, metrics: Mapping[str, float]) -> float:
        """Look up the objective in a run's held-out metrics, with or without Trainer's ``eval_``.

        Raises:
            UserError: the metric is missing.
            FloatingPointError: the metric is not finite.
        """
        plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        if self.name not in plain:
            names = ", ".join(plain) or "none"
            raise UserError(
                f"objective: got {self.name!r}, expected one of the held-out metrics: {names}"
            )
        if not math.isfinite(plain[self.name]):
            raise FloatingPointError(f"held-out {self.name} is {plain[self.name]}")
        return float(plain[self.name])


def resolve(config: RunConfig, requested: str = "auto") -> tuple[Objective, RunConfig]:
    """Return the objective, and the settings with which a run computes it.

    Args:
        requested: a metric of the task, ``loss``, ``metric`` (the task's first), or ``auto``.
            ``auto`` is the metric if the task has classes or ``select`` requests it, else the loss.
    """
    if not config.holds_out:
        raise UserError(
            "validation: got 0, expected held-out training rows to choose by, such as "
            "--validation 0.1"
        )
    task = tasks.get(config.task)
    if requested == "auto":
        metric = task.metrics and (task.decoding is None or config.select == "metric")
        requested = "metric" if metric else LOSS
    if requested == LOSS:
        # GLUE's held-out rows are only read if the run selects by them
        unseen = config.select == "none" and not config.validation
        return Objective(LOSS), config.replace(select="loss") if unseen else config
    if not task.metrics or requested not in ("metric", *task.metrics):
        expected = ", ".join((LOSS, *task.metrics))
        raise UserError(f"objective: got {requested!r}, expected auto or one of {expected}")
    name = task.metrics[0] if requested == "metric" else requested
    # a run computes its task's held-out metrics only if it selects by them
    return Objective(name), config.replace(select="metric") if config.select == "none" else config
