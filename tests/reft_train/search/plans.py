"""Searches for tests: a learning rate and a rank to choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from reft_train.config import RunConfig, build
from reft_train.search.space import choices
from reft_train.search.study import Objective, SearchPlan

SPACE = {"lr": FloatDistribution(1e-5, 1e-1, log=True), "rank": choices((1, 2, 4, 8))}
ACCURACY = Objective("accuracy")


def config(folder: Path, **changes: Any) -> RunConfig:
    """Settings whose output is ``folder``."""
    values = {"model": "none", "task": "boolq", "validation": 0.5, "output": str(folder), **changes}
    return build(values)


def plan(folder: Path, changes: dict[str, Any] | None = None, **fields: Any) -> SearchPlan:
    """A search of four trials in ``folder``, without pruning, ``changes`` being settings."""
    values = {"space": SPACE, "objective": ACCURACY, "trials": 4, "prune": False, **fields}
    return SearchPlan(config(folder, **(changes or {})), **values)


def silent(text: str) -> None:
    """Say nothing."""
