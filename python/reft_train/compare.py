"""``compare``: ReFT and PEFT methods on one task and model, with one tuning budget and seeds.

Each method has one search with the same budget; its best settings are trained and tested.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas

from reft_train import flags, reporting, tasks
from reft_train.commands import COMPARED, CompareOptions
from reft_train.config import METHODS, RunConfig
from reft_train.errors import UserError, one_line, wrong
from reft_train.files import check_own_folder, dumps, write_text
from reft_train.models import model_config
from reft_train.search.command import one_process
from reft_train.search.space import Space, small_space_of
from reft_train.search.study import Objective, SearchPlan, Train, resolve, search, settings_of
from reft_train.training import session
from reft_train.training.outcome import Outcome

REFUSED = "not available: "
SCORES = ("test", "validation")
# how the costs of a method's tested runs are combined; memory in MiB
COSTS = {"trainable": "first", "head": "first", "step_seconds": "median"}
COSTS |= {"tokens_per_second": "median", "peak": "max"}


@dataclass(frozen=True)
class ComparisonPlan:
    """Configuration of a comparison.

    Attributes:
        config: settings shared by all methods; ``output`` is the comparison's folder.
        trials: budget of each method's search.
        seeds: seeds of the tested runs of each method.
    """

    config: RunConfig
    methods: tuple[str, ...]
    objective: Objective
    seeds: tuple[int, ...] = (42, 43, 44)
    trials: int = 8
    sampler_seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


@dataclass(frozen=True)
class Comparison:
    """Results in the order of the plan's methods; ``outcomes`` by (method, seed).

    A row has ``status``, what the search chose and cost, and the number of tested runs, ``seeds``.
    """

    plan: ComparisonPlan
    rows: list[dict[str, Any]]
    outcomes: Mapping[tuple[str, int], Outcome]

    @property
    def summary(self) -> pandas.DataFrame:
        """The rows, with what the tested runs of each method have in common.

        Scores have a mean and a sample standard deviation over the runs: ``validation``,
        ``test_<set>``, the task's first metric, and ``test``, its average over the test sets.
        """
        metric = next(iter(tasks.get(self.plan.config.task).metrics), None)
        runs = []
        for (method, _), one in self.outcomes.items():
            run = {**asdict(one), "method": method, "peak": one.memory.peak}
            tests = {name: scores[metric] for name, scores in one.tests.items() if metric}
            run |= {f"test_{name}": value for name, value in tests.items()}
            run["test"] = fmean(tests.values()) if tests else math.nan
            run["validation"] = one.validation.get(self.plan.objective.name, math.nan)
            runs.append(run)
        frame = pandas.DataFrame(self.rows)
        if not runs:
            return frame
        grouped = pandas.DataFrame(runs).groupby("method")
        names = [name for name in runs[0] if name in SCORES or name.startswith("test_")]
        scores = grouped[names].agg(["mean", "std"])
        scores = scores.rename(columns={"std": "deviation"})
        scores.columns = ["_".join(pair) for pair in scores.columns]
        costs = grouped[list(COSTS)].agg(COSTS)
        return frame.join(scores, on="method").join(costs, on="method")


def run_isolated(config: RunConfig) -> Outcome:
    """Train and test in a new process, which has its own peak memory; its errors are raised here.

    Raises:
        KeyboardInterrupt: the run was interrupted.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        outcome = pool.submit(session.train, config).result()
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


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
    check_own_folder(plan.folder, ["search"])
    tuned = {method: _tuned(plan, method, spaces[method], train, log) for method in plan.methods}
    refused = [row["status"] for row, _ in tuned.values() if row["status"].startswith(REFUSED)]
    if len(refused) == len(tuned):
        raise UserError(refused[0].removeprefix(REFUSED))
    outcomes: dict[tuple[str, int], Outcome] = {}
    failures: dict[str, list[str]] = defaultdict(list)
    turns, runs = deque(method for method, (_, best) in tuned.items() if best), []
    for seed in plan.seeds:
        runs += [(method, seed) for method in turns]
        turns.rotate(-1)  # another method begins with each seed: noise is spread evenly
    for method, seed in runs:
        output = str(plan.folder / "runs" / method / f"seed-{seed}")
        own = {"seed": seed, "output": output, "skip_test": False, "overwrite": True}
        config = tuned[method][1].replace(**own)
        outcome = _finished(config)
        if outcome is None:
            log(f"{method}, seed {seed}: training and testing")
            try:
                outcome = final(config)
            except Exception as error:  # whatever ends a run leaves the other runs
                failures[method].append(f"{type(error).__name__}: {one_line(error)}")
                log(f"{method}, seed {seed}: failed: {failures[method][-1]}")
                continue
        outcomes[method, seed] = outcome
    for method, (row, _) in tuned.items():
        done = [outcomes[method, seed] for seed in plan.seeds if (method, seed) in outcomes]
        if failed := failures[method]:
            row["status"] = f"{len(failed)} of {len(plan.seeds)} seeds failed: {failed[0]}"
        row["seeds"] = len(done)
    return Comparison(plan, [row for row, _ in tuned.values()], outcomes)


def _tuned(
    plan: ComparisonPlan, method: str, space: Space, train: Train, log: Callable
) -> tuple[dict[str, Any], RunConfig | None]:
    """Run a method's search; return its result and the best settings or None."""
    output = str(plan.folder / "search" / method)
    config = plan.config.replace(method=method, output=output, resume=False, overwrite=False)
    fair = {"sampler_seed": plan.sampler_seed, "prune": False, "start": False}
    row = {"method": method, "status": "ok", "varied": {}, "trials": 0, "search_seconds": 0.0}
    log(f"{method}: choosing {', '.join(space)} on held-out rows")
    try:
        search_plan = SearchPlan(config, space, plan.objective, plan.trials, **fair)
        result = search(search_plan, train, lambda line: log(f"  {line}"))
    except UserError as error:
        return row | {"status": f"{REFUSED}{error}"}, None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # raised by PEFT and models that do not support the method
        return row | {"status": f"failed: {type(error).__name__}: {one_line(error)}"}, None
    if result.interrupted:
        raise KeyboardInterrupt
    spent = result.study.trials_dataframe(("duration",)).duration.sum()
    row["trials"], row["search_seconds"] = plan.trials, spent.total_seconds()
    if result.best is None:
        reason = result.settled[0].user_attrs["reason"]
        return row | {"status": f"failed: {reason}"}, None
    return row | {"varied": settings_of(result.best)}, result.best_config


def _finished(config: RunConfig) -> Outcome | None:
    """Return the outcome of an identical finished run, or None."""
    try:
        outcome = Outcome.load(config.output)
    except UserError:
        return None
    place = dict.fromkeys(("output", "resume", "overwrite"))  # settings that do not identify a run
    same = {**config.model_dump(), **place} == {**outcome.config, **place}
    return outcome if same and not outcome.interrupted else None


def resolve_plan(parsed: argparse.Namespace) -> ComparisonPlan:
    """Build the comparison plan from the flags."""
    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/compare"
    options = flags.options(parsed, CompareOptions)
    objective, config = resolve(flags.settings(parsed), options.objective)
    generates = tasks.get(config.task).decoding is not None
    methods = options.methods or [*COMPARED, *(() if generates else ("head",))]
    for method in methods:
        if method not in METHODS:
            raise wrong("--methods", repr(method), f"some of {', '.join(METHODS)}")
    for name, values in (("--methods", methods), ("--seeds", options.seeds)):
        if len(set(values)) < len(values):
            raise wrong(name, " ".join(map(str, values)), "each once")
    budget = (options.budget_trials, options.sampler_seed)
    return ComparisonPlan(config, tuple(methods), objective, tuple(options.seeds), *budget)


def table(comparison: Comparison) -> str:
    """Format a line for each method: its scores, its cost, and what its search chose."""
    names = [f"{score}_{kind}" for score in SCORES for kind in ("mean", "deviation")]
    names = ["method", *names, "seeds", *COSTS, "varied", "status"]
    frame = comparison.summary.reindex(columns=names)
    return frame.to_string(index=False, na_rep="-", float_format="{:,.4g}".format)


def write_results(comparison: Comparison) -> None:
    """Write ``compare.json`` and ``compare.csv``."""
    plan, folder, summary = comparison.plan, comparison.plan.folder, comparison.summary
    numbers = {
        "config": plan.config.model_dump(),
        "seeds": plan.seeds,
        "objective": plan.objective.name,
        "budget": {"trials": plan.trials},
        "methods": json.loads(summary.to_json(orient="records", double_precision=15)),
        "runs": [
            {"method": method, "seed": seed, **asdict(outcome)}
            for (method, seed), outcome in comparison.outcomes.items()
        ],
        "versions": reporting.versions(),
    }
    write_text(folder / "compare.json", dumps(numbers))
    write_text(folder / "compare.csv", summary.to_csv(index=False))


def run(
    parsed: argparse.Namespace,
    train: Train = session.train,
    final: Callable[[RunConfig], Outcome] = run_isolated,
) -> int:
    """Run the command. Returns 0, 1 when a method or a run failed, or 130 when interrupted.

    A method that the model does not support is not a failure.

    Args:
        train, final: see :func:`compare`.
    """
    one_process()
    plan = resolve_plan(parsed)
    hf_config, methods = model_config(plan.config), plan.methods
    spaces = {m: small_space_of(plan.config.replace(method=m), hf_config) for m in methods}
    try:
        comparison = compare(plan, spaces, train, final)
    except KeyboardInterrupt:
        text = f"interrupted; the same command resumes the comparison in {plan.folder}"
        print(text, file=sys.stderr)
        return 130
    write_results(comparison)
    print(table(comparison))
    states = [row["status"] for row in comparison.rows]
    return int(any(text != "ok" and not text.startswith(REFUSED) for text in states))
