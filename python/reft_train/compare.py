"""``compare``: ReFT and PEFT methods on one task and model, with one tuning budget and seeds.

Each method has one search with the same budget; its best settings are trained and tested.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas

from reft_train import flags, reporting, tasks
from reft_train.commands import COMPARED
from reft_train.config import METHODS, RunConfig, dump_yaml
from reft_train.errors import UserError, one_line, wrong
from reft_train.files import check_own_folder, dumps, write_bytes, write_text
from reft_train.methods import TITLES
from reft_train.models import model_config
from reft_train.search.command import one_process
from reft_train.search.space import Space, small_space_of
from reft_train.search.study import (
    Objective,
    Search,
    SearchPlan,
    Train,
    open_study,
    resolve,
    search,
    shown,
)
from reft_train.training import session
from reft_train.training.outcome import Outcome

REFUSED = "not available: "
_MEASURED = ("test", "validation", "trainable", "head", "step_seconds", "tokens_per_second")
_MEASURED += ("peak_mib", "memory_method")


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


@dataclass(frozen=True)
class Comparison:
    """Results in the order of the plan's methods; ``outcomes`` by (method, seed).

    A row has the fields of ``compare.json``: ``status``, what the search chose and, if a run was
    tested, those of :func:`summarized`.
    """

    plan: ComparisonPlan
    rows: list[dict[str, Any]]
    outcomes: Mapping[tuple[str, int], Outcome]


def spread(values: pandas.Series) -> dict[str, float] | None:
    """Return the mean and the sample standard deviation (NaN for a single value)."""
    if values.empty:
        return None
    return {"mean": values.mean(skipna=False), "deviation": values.std(skipna=False)}


def summarized(outcomes: Sequence[Outcome], plan: ComparisonPlan) -> dict[str, Any]:
    """Aggregate a method's tested runs.

    ``test`` is the task's first metric, averaged over the test sets of a run, then over the runs.
    """
    frame = pandas.DataFrame(map(asdict, outcomes))
    metric = next(iter(tasks.get(plan.config.task).metrics), None)
    by_set = [{name: m[metric] for name, m in sets.items() if metric} for sets in frame.tests]
    tests = pandas.DataFrame(by_set, index=frame.index)
    memory = pandas.DataFrame(list(frame.memory))
    name = plan.objective.name
    held_out = [metrics[name] for metrics in frame.validation if name in metrics]
    return {
        "seeds": len(frame),
        "test": None if tests.empty else spread(tests.mean(axis=1, skipna=False)),
        "tests": {name: spread(values) for name, values in tests.items()},
        "validation": spread(pandas.Series(held_out, dtype=float)),
        "trainable": int(frame.trainable[0]),
        "head": int(frame["head"][0]),
        **frame[["step_seconds", "tokens_per_second"]].median().to_dict(),
        "peak_mib": memory.peak.max(),
        "memory_method": memory.method[0],
    }


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
    check_own_folder(plan.folder, ["search"])
    tuned = {method: _tuned(plan, method, spaces[method], train, log) for method in plan.methods}
    refused = [row["status"] for row, _ in tuned.values() if row["status"].startswith(REFUSED)]
    if len(refused) == len(tuned):
        raise UserError(refused[0].removeprefix(REFUSED))
    outcomes: dict[tuple[str, int], Outcome] = {}
    failures: dict[str, list[str]] = {method: [] for method in plan.methods}
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
            except RunFailed as error:
                log(f"{method}, seed {seed}: failed: {error}")
                failures[method].append(str(error))
                continue
        outcomes[method, seed] = outcome
    for method, (row, _) in tuned.items():
        done = [outcomes[method, seed] for seed in plan.seeds if (method, seed) in outcomes]
        failed = failures[method]
        if failed:
            row["status"] = f"{len(failed)} of {len(plan.seeds)} seeds failed: {failed[0]}"
        row |= summarized(done, plan) if done else {}
    return Comparison(plan, [row for row, _ in tuned.values()], outcomes)


def _tuned(
    plan: ComparisonPlan, method: str, space: Space, train: Train, log: Callable
) -> tuple[dict[str, Any], RunConfig | None]:
    """Run a method's search; return its result and the best settings or None."""
    output = str(plan.folder / "search" / method)
    config = plan.config.replace(method=method, output=output, resume=False, overwrite=False)
    budget = {"trials": plan.trials, "timeout": plan.seconds, "sampler_seed": plan.sampler_seed}
    search_plan = SearchPlan(config, space, plan.objective, **budget, pruner="none", start=False)
    row = {"method": method, "status": "ok", "varied": {}, "trials": 0, "search_seconds": 0.0}
    row |= {**dict.fromkeys(_MEASURED), "seeds": 0, "tests": {}}
    log(f"{method}: choosing {', '.join(space)} on held-out rows")
    if plan.seconds is not None and search_plan.folder.exists():
        # subtract the time used by an interrupted comparison
        earlier = Search(search_plan, open_study(search_plan)).trials
        left = plan.seconds - sum(trial.seconds for trial in earlier)
        search_plan = replace(search_plan, timeout=left)
    try:
        result = search(search_plan, train, lambda line: log(f"  {line}"))
    except UserError as error:
        return row | {"status": f"{REFUSED}{error}"}, None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        # raised by PEFT and models that do not support the method
        return row | {"status": f"failed: {type(error).__name__}: {one_line(error)}"}, None
    if result.interrupted:
        raise KeyboardInterrupt
    settled = [trial for trial in result.trials if trial.settled]
    row["trials"] = len(settled)
    row["search_seconds"] = sum(trial.seconds for trial in result.trials)
    if result.best is None:
        reasons = (trial.reason for trial in settled if trial.reason)
        reason = next(reasons, "no trial finished within the budget")
        return row | {"status": f"failed: {reason}"}, None
    return row | {"varied": result.best.settings}, result.best_config


def _finished(config: RunConfig) -> Outcome | None:
    """Return the outcome of an identical finished run, or None."""
    try:
        outcome = Outcome.load(config.output)
    except UserError:
        return None
    place = dict.fromkeys(("output", "resume", "overwrite"))  # settings that do not identify a run
    same = {**config.to_dict(), **place} == {**outcome.config, **place}
    return outcome if same and not outcome.interrupted else None


def resolve_plan(parsed: argparse.Namespace) -> ComparisonPlan:
    """Build the comparison plan from the flags."""
    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/compare"
    objective, config = resolve(flags.settings(parsed), parsed.objective)
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise wrong("--seeds", " ".join(map(str, parsed.seeds)), "each seed once")
    trials = None if parsed.budget_seconds is not None else parsed.budget_trials or 8
    methods, seeds = _methods(config, parsed.methods), tuple(parsed.seeds)
    budget = (trials, parsed.budget_seconds, parsed.sampler_seed)
    return ComparisonPlan(config, methods, objective, seeds, *budget)


def _methods(config: RunConfig, requested: Sequence[str] | None) -> tuple[str, ...]:
    if requested is None:
        return COMPARED if tasks.get(config.task).decoding is not None else (*COMPARED, "head")
    for method in requested:
        if method not in METHODS:
            raise wrong("--methods", repr(method), f"some of {', '.join(METHODS)}")
    if len(set(requested)) < len(requested):
        raise wrong("--methods", " ".join(requested), "each method once")
    return tuple(requested)


def table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    def line(row: dict[str, Any]) -> tuple[str, ...]:
        numbers = ("-",) * 4
        if row["trainable"] is not None:
            trained = f"{row['trainable']:,}" + (f" + {row['head']:,}" if row["head"] else "")
            step, speed = f"{row['step_seconds'] * 1e3:.1f} ms", f"{row['tokens_per_second']:,.0f}"
            numbers = (trained, step, speed, f"{row['peak_mib']:,.0f} MiB")
        chosen = ", ".join(f"{name} {shown(value)}" for name, value in row["varied"].items())
        seeds = f"{row['seeds']}/{len(comparison.plan.seeds)}"
        tried = (mean_of(row["test"]), mean_of(row["validation"]), seeds)
        return (TITLES[row["method"]], *tried, *numbers, chosen or "-", row["status"])

    measured = ("trained", "step", "tokens/s", "peak memory", "chosen", "status")
    held_out = f"held-out {comparison.plan.objective.name}"
    header = ("method", "test", held_out, "seeds", *measured)
    return header, [line(row) for row in comparison.rows]


def mean_of(spread: dict[str, float] | None) -> str:
    """Format a mean, with the deviation if there are several values."""
    if spread is None:
        return "-"
    several = not math.isnan(spread["deviation"])
    return f"{spread['mean']:.4f}" + (f" ± {spread['deviation']:.4f}" if several else "")


def notes(comparison: Comparison) -> list[str]:
    plan = comparison.plan
    budget = f"{plan.trials} trial(s)" if plan.seconds is None else f"{plan.seconds:g} seconds"
    lines = [
        f"Each method had {budget} to choose its settings by held-out {plan.objective.name} with "
        f"seed {plan.config.seed}; the best were trained and tested with seeds "
        f"{', '.join(map(str, plan.seeds))}: mean ± sample standard deviation.",
        "test: the task's first metric, averaged over the test sets. trained: parameters of the "
        "method, and of a new head. step and tokens/s: medians over the runs. peak memory: the "
        "highest of the runs, each in a separate process. The runs alternate between methods.",
    ]
    memory = {row["memory_method"]: None for row in comparison.rows if row["memory_method"]}
    lines += [f"Memory: {method}." for method in memory]
    if plan.config.holds_out and not plan.config.validation:
        lines.append(
            "GLUE's published validation rows are split anew by each seed, as in the paper: rows "
            "used to choose the settings with one seed are among those reported with another."
        )
    return lines


def write_report(comparison: Comparison) -> None:
    """Write ``compare.json``, ``compare.csv``, ``compare.png`` and ``report.html``."""
    plan, folder, rows = comparison.plan, comparison.plan.folder, comparison.rows
    runs = [
        {"method": method, "seed": seed, **asdict(outcome)}
        for (method, seed), outcome in comparison.outcomes.items()
    ]
    numbers = {
        "config": plan.config.to_dict(),
        "seeds": plan.seeds,
        "objective": plan.objective.name,
        "budget": {"trials": plan.trials, "seconds": plan.seconds},
        "methods": rows,
        "runs": runs,
        "versions": reporting.versions(),
    }
    write_text(folder / "compare.json", dumps(numbers))
    write_text(folder / "compare.csv", pandas.json_normalize(rows, sep="_").to_csv(index=False))
    measured = "test" if any(row["test"] for row in rows) else "validation"
    points = [row for row in rows if row[measured]]
    figure = reporting.new_figure()
    axes = figure.subplots()
    counts = [row["trainable"] + row["head"] for row in points]
    for count, row in zip(counts, points, strict=True):
        value, label = row[measured], TITLES[row["method"]]
        bar = {"yerr": value["deviation"], "fmt": "o", "capsize": 4}
        axes.errorbar(count, value["mean"], **bar, label=label)
    kind = {"test": "test metric", "validation": "held-out metric"}[measured]
    axes.set(xlabel="trained parameters", ylabel=kind)
    axes.set_xscale("log" if all(counts) else "linear")
    pngs = []
    if points:
        axes.legend()
        pngs.append(write_bytes(folder / "compare.png", reporting.to_png(figure)).read_bytes())
    sets = list(dict.fromkeys(name for row in rows for name in row["tests"]))
    tests = [[mean_of(row["tests"].get(name)) for name in sets] for row in rows]
    each = [(TITLES[row["method"]], *cells) for row, cells in zip(rows, tests, strict=True)]
    sections = {
        "Methods": [table(comparison), *notes(comparison), *pngs],
        "Test sets": [(("method", *sets), each)] if len(sets) > 1 else [],
        "Shared settings and versions": [plan.config.to_dict(), reporting.versions()],
    }
    reporting.write_page(folder / "report.html", f"Methods on {plan.config.task}", sections)


def run(
    parsed: argparse.Namespace, train: Callable | None = None, final: Callable | None = None
) -> int:
    """Run the command. Returns 0, 1 when a method or a run failed, or 130 when interrupted.

    A method that the model does not support is not a failure.

    Args:
        train: replaces :func:`reft_train.training.session.train`.
        final: replaces the subprocess of each tested run.
    """
    one_process()
    plan = resolve_plan(parsed)
    hf_config, methods = model_config(plan.config), plan.methods
    spaces = {m: small_space_of(plan.config.replace(method=m), hf_config) for m in methods}
    try:
        how = (train or session.train, final or run_isolated)
        comparison = compare(plan, spaces, *how)
    except KeyboardInterrupt:
        text = f"interrupted; the same command resumes the comparison in {plan.folder}"
        print(text, file=sys.stderr)
        return 130
    write_report(comparison)
    print(reporting.text_table(*table(comparison)), *notes(comparison), sep="\n")
    states = [row["status"] for row in comparison.rows]
    return int(any(text != "ok" and not text.startswith(REFUSED) for text in states))
