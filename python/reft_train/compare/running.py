"""Execution of a comparison: one search per method with equal budgets, then tested runs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reft_train import tasks
from reft_train.config import RunConfig, dump_yaml
from reft_train.errors import UserError, one_line, wrong
from reft_train.files import write_text
from reft_train.search.space import Space
from reft_train.search.study import Objective, Search, SearchPlan, Train, open_study, search
from reft_train.training.outcome import Outcome

REFUSED = "not available: "


@dataclass(frozen=True)
class ComparisonPlan:
    """Configuration of a comparison.

    Attributes:
        config: settings shared by all methods; ``output`` is the comparison's folder.
        trials, seconds: budget of each method's search; exactly one of the two is None.
        seeds: seeds of the tested runs of each method.
    """

    config: RunConfig
    methods: tuple[str, ...]
    objective: Objective
    seeds: tuple[int, ...] = (42, 43, 44)
    trials: int | None = 8
    seconds: float | None = None
    sampler_seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def search_plan(self, method: str, space: Space) -> SearchPlan:
        """Return the plan of a method's search, with a separate folder."""
        output = str(self.folder / "search" / method)
        config = self.config.replace(method=method, output=output, resume=False, overwrite=False)
        budget = {"trials": self.trials, "timeout": self.seconds, "sampler_seed": self.sampler_seed}
        return SearchPlan(config, space, self.objective, **budget, pruner="none", start=False)

    def final_config(self, best: RunConfig, seed: int) -> RunConfig:
        """Return the settings of a tested run: the method's best ones with the given seed."""
        output = str(self.folder / "runs" / best.method / f"seed-{seed}")
        return best.replace(seed=seed, output=output, skip_test=False, resume=False, overwrite=True)

    def order(self, methods: Sequence[str]) -> list[tuple[str, int]]:
        """Order the tested runs by seed, rotating the methods to spread machine noise evenly."""
        turns, count = enumerate(self.seeds), len(methods)
        return [(methods[(at + turn) % count], seed) for turn, seed in turns for at in range(count)]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Return the spread of values, or None without values."""
        several = len(values) > 1
        deviation = statistics.stdev(values) if several else None
        return cls(statistics.fmean(values), deviation) if values else None

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.deviation is None else f" ± {self.deviation:.4f}")


@dataclass(frozen=True)
class MethodResult:
    """Results of a method. ``test`` is the mean over the test sets of a run, then over runs."""

    method: str
    status: str = "ok"
    varied: dict[str, Any] = field(default_factory=dict)
    trials: int = 0
    search_seconds: float = 0.0
    seeds: int = 0
    test: Spread | None = None
    tests: dict[str, Spread] = field(default_factory=dict)
    validation: Spread | None = None
    trainable: int | None = None
    head: int | None = None
    step_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_mib: float | None = None
    memory_method: str = ""

    def measured(
        self, outcomes: Sequence[Outcome], failures: Sequence[str], plan: ComparisonPlan
    ) -> MethodResult:
        """Add the results of the tested runs."""
        status, metric = self.status, next(iter(tasks.get(plan.config.task).metrics), None)
        if failures:
            seeds = len(failures) + len(outcomes)
            status = f"{len(failures)} of {seeds} seeds failed: {failures[0]}"
        if not outcomes:
            return replace(self, status=status)
        sets, held_out = outcomes[0].tests if metric else (), plan.objective.name
        by_set = {name: [outcome.tests[name][metric] for outcome in outcomes] for name in sets}
        held = [
            outcome.validation[held_out] for outcome in outcomes if held_out in outcome.validation
        ]
        return replace(
            self,
            status=status,
            seeds=len(outcomes),
            test=Spread.of([statistics.fmean(run) for run in zip(*by_set.values(), strict=True)]),
            tests={name: Spread.of(values) for name, values in by_set.items()},
            validation=Spread.of(held),
            trainable=outcomes[0].trainable,
            head=outcomes[0].head,
            step_seconds=statistics.median(outcome.step_seconds for outcome in outcomes),
            tokens_per_second=statistics.median(outcome.tokens_per_second for outcome in outcomes),
            peak_mib=max(outcome.memory.peak for outcome in outcomes),
            memory_method=outcomes[0].memory.method,
        )


@dataclass(frozen=True)
class Comparison:
    """Results in the order of the plan's methods; ``outcomes`` by (method, seed)."""

    plan: ComparisonPlan
    rows: list[MethodResult]
    outcomes: Mapping[tuple[str, int], Outcome]


class RunFailed(Exception):
    """Raised when a run's process ends without a result; the message is its last output."""


def run_isolated(config: RunConfig) -> Outcome:
    """Run ``reft-train run`` in a subprocess with separate peak memory; output goes to a ``.log``.

    Raises:
        RunFailed: the run failed.
        KeyboardInterrupt: the run was interrupted.
    """
    output = Path(config.output)
    plan = write_text(output.with_name(f"{output.name}.yaml"), dump_yaml(config))
    log = output.with_name(f"{output.name}.log")
    command = [sys.executable, "-m", "reft_train", "run", "--config", str(plan)]
    # the new interpreter imports the same packages
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with log.open("wb") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1][:300] if lines else "no output"
        raise RunFailed(f"{last} (exit code {done.returncode}, see {log})")
    return Outcome.load(output)


def compare(
    plan: ComparisonPlan,
    spaces: Mapping[str, Space],
    train: Train,
    final: Callable[[RunConfig], Outcome] = run_isolated,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Tune every method on held-out rows, then train and test its best settings with each seed.

    Finished work with the same settings is reused.

    Args:
        spaces: search space of each method.
        train: trains a search trial, in this process.
        final: trains and tests a final run.

    Raises:
        UserError: bad input for every method, or a folder with another comparison.
        KeyboardInterrupt: Ctrl-C.
    """
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise wrong("output", f"{folder}, which is a file", "a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "search").is_dir():
        raise wrong("output", f"{folder}, which contains other files", "a new folder")
    tuned = {method: _tuned(plan, method, spaces[method], train, log) for method in plan.methods}
    refused = [row.status for row, _ in tuned.values() if row.status.startswith(REFUSED)]
    if len(refused) == len(tuned):
        raise UserError(refused[0].removeprefix(REFUSED))
    outcomes: dict[tuple[str, int], Outcome] = {}
    failures: dict[str, list[str]] = {method: [] for method in plan.methods}
    for method, seed in plan.order([method for method, (_, best) in tuned.items() if best]):
        config = plan.final_config(tuned[method][1], seed)
        outcome = _finished(config)
        if outcome is None:
            log(f"{method}, seed {seed}: training and testing")
            try:
                outcome = final(config)
            except RunFailed as error:
                log(f"{method}, seed {seed}: failed: {error}")
                failures[method].append(str(error))
                continue
        outcomes[method, seed] = outcome
    rows = []
    for method, (row, _) in tuned.items():
        done = [outcomes[method, seed] for seed in plan.seeds if (method, seed) in outcomes]
        rows.append(row.measured(done, failures[method], plan))
    return Comparison(plan, rows, outcomes)


def _tuned(
    plan: ComparisonPlan, method: str, space: Space, train: Train, log: Callable
) -> tuple[MethodResult, RunConfig | None]:
    """Run a method's search; return its result and the best settings or None."""
    search_plan = plan.search_plan(method, space)
    log(f"{method}: choosing {', '.join(space)} on held-out rows")
    if plan.seconds is not None and search_plan.folder.exists():
        # subtract the time used by an interrupted comparison
        earlier = Search(search_plan, open_study(search_plan)).trials
        left = plan.seconds - sum(trial.seconds for trial in earlier)
        search_plan = replace(search_plan, timeout=left)
    try:
        result = search(search_plan, train, lambda line: log(f"  {line}"))
    except UserError as error:
        return MethodResult(method, f"{REFUSED}{error}"), None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # raised by PEFT and models that do not support the method
        return MethodResult(method, f"failed: {type(error).__name__}: {one_line(error)}"), None
    if result.interrupted:
        raise KeyboardInterrupt
    known = result.trials
    settled = [trial for trial in known if trial.settled]
    seconds = sum(trial.seconds for trial in known)
    row = MethodResult(method, trials=len(settled), search_seconds=seconds)
    if result.best is None:
        reasons = (trial.reason for trial in settled if trial.reason)
        reason = next(reasons, "no trial finished within the budget")
        return replace(row, status=f"failed: {reason}"), None
    return replace(row, varied=result.best.settings), result.best_config


def _finished(config: RunConfig) -> Outcome | None:
    """Return the outcome of an identical finished run, or None."""
    try:
        outcome = Outcome.load(config.output)
    except UserError:
        return None
    place = dict.fromkeys(("output", "resume", "overwrite"))  # settings that do not identify a run
    same = {**config.to_dict(), **place} == {**outcome.config, **place}
    return outcome if same and not outcome.interrupted else None
