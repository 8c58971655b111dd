"""From finished runs to a row for each method: means and standard deviations over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.training.outcome import Outcome

# where a run lies, and how it came there, is not what it is
_FREE = ("output", "resume", "overwrite")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single number)."""

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Tuned:
    """A method's search: the best settings, or why there are none; ``available``: the method can
    run on this model at all.
    """

    method: str
    best: RunConfig | None
    varied: dict[str, Any] = field(default_factory=dict)
    trials: int = 0
    seconds: float = 0.0
    reason: str = ""
    available: bool = True


@dataclass(frozen=True)
class Row:
    """A method's line. ``tests`` holds each test set; ``test`` is the mean over the sets in each
    run, then over runs.
    """

    method: str
    status: str
    varied: dict[str, Any]
    trials: int
    search_seconds: float
    seeds: int
    test: Spread | None = None
    tests: dict[str, Spread] = field(default_factory=dict)
    validation: Spread | None = None
    trainable: int | None = None
    head: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_mib: float | None = None
    memory_method: str = ""


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and deviation; None of nothing."""
    if not values:
        return None
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


def finished(config: RunConfig) -> Outcome | None:
    """The outcome of the very same run, where it was done before; None where it was not, or not
    to its end.
    """
    try:
        outcome = Outcome.load(config.output)
    except UserError:
        return None
    own = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    done = {name: value for name, value in outcome.config.items() if name not in _FREE}
    return outcome if own == done and not outcome.interrupted else None


def row(
    tuned: Tuned,
    outcomes: Sequence[Outcome],
    failures: Sequence[str],
    metric: str | None,
    held_out: str,
) -> Row:
    """A method's line.

    Args:
        outcomes: of the seeds that finished. failures: reasons of those that did not.
        metric: the task's first, None where the task has none. held_out: the objective's name.
    """
    if tuned.best is None:
        status = (
            f"not available: {tuned.reason}" if not tuned.available else f"failed: {tuned.reason}"
        )
    elif failures:
        status = f"{len(failures)} of {len(failures) + len(outcomes)} seeds failed: {failures[0]}"
    else:
        status = "ok"
    common = Row(tuned.method, status, tuned.varied, tuned.trials, tuned.seconds, len(outcomes))
    if not outcomes:
        return common
    sets = list(outcomes[0].tests) if metric is not None else []
    by_set = {name: [outcome.tests[name][metric] for outcome in outcomes] for name in sets}
    return Row(
        **{**vars(common)}
        | {
            "test": spread(
                [statistics.fmean(values) for values in zip(*by_set.values(), strict=True)]
            ),
            "tests": {name: spread(values) for name, values in by_set.items()},
            "validation": spread(
                [
                    outcome.validation[held_out]
                    for outcome in outcomes
                    if held_out in outcome.validation
                ]
            ),
            "trainable": outcomes[0].trainable,
            "head": outcomes[0].head,
            "step_seconds": statistics.median(outcome.step_seconds for outcome in outcomes),
            "tokens_per_second": statistics.median(
                outcome.tokens_per_second for outcome in outcomes
            ),
            "peak_mib": max(outcome.memory.peak for outcome in outcomes),
            "memory_method": outcomes[0].memory.method,
        }
    )
