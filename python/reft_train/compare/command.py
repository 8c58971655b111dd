"""``compare``: ReFT and PEFT methods on one task and model, with one tuning budget and seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from reft_train import flags, tasks
from reft_train.config import FIELDS, METHODS, RunConfig
from reft_train.errors import wrong
from reft_train.search.command import add_choice, one_process

if TYPE_CHECKING:
    from reft_train.compare.running import Comparison, ComparisonPlan, MethodResult

DESCRIPTION = """Compare methods on one task and model. Each method gets the same budget to choose
its learning rate and size on held-out training rows; its best settings are then trained and tested
with every seed, each run in a separate process. The same command again resumes a comparison.
Writes compare.json, compare.csv, compare.png and report.html."""
DEFAULT = ("loreft", "nodireft", "noreft", "lora", "dora", "prefix", "ia3")
_NOT_HERE = ("method", "resume", "overwrite", "skip_test", "lr", "rank", "prefix_tokens", "recipe")


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    text = "compare methods under one tuning budget"
    command = subparsers.add_parser("compare", help=text, description=DESCRIPTION)
    group = command.add_argument_group("comparison")
    text = f"methods; none: {' '.join(DEFAULT)} (and head)"
    group.add_argument("--methods", nargs="+", metavar="METHOD", help=text)
    several = {"nargs": "+", "type": flags.SEED, "default": [42, 43, 44], "metavar": "N"}
    group.add_argument("--seeds", **several, help="seeds of the tested runs")
    budget = group.add_mutually_exclusive_group()
    text = "trials of each search (default: 8)"
    budget.add_argument("--budget-trials", type=flags.number(int, 1), metavar="N", help=text)
    text = "seconds of each method's search"
    budget.add_argument("--budget-seconds", type=flags.number(float, 1e-9), metavar="S", help=text)
    add_choice(group.add_argument)
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_HERE])
    command.set_defaults(run=run)


def resolve_plan(parsed: argparse.Namespace) -> ComparisonPlan:
    """Build the comparison plan from the flags."""
    from reft_train.compare.running import ComparisonPlan
    from reft_train.search.study import resolve

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
        return DEFAULT if tasks.get(config.task).decoding is not None else (*DEFAULT, "head")
    for method in requested:
        if method not in METHODS:
            raise wrong("--methods", repr(method), f"some of {', '.join(METHODS)}")
    if len(set(requested)) < len(requested):
        raise wrong("--methods", " ".join(requested), "each method once")
    return tuple(requested)


def table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    from reft_train.methods import TITLES
    from reft_train.search.study import shown

    def line(row: MethodResult) -> tuple[str, ...]:
        numbers = ("-",) * 4
        if row.trainable is not None:
            trained = f"{row.trainable:,}" + (f" + {row.head:,}" if row.head else "")
            step, speed = f"{row.step_seconds * 1e3:.1f} ms", f"{row.tokens_per_second:,.0f}"
            numbers = (trained, step, speed, f"{row.peak_mib:,.0f} MiB")
        chosen = ", ".join(f"{name} {shown(value)}" for name, value in row.varied.items())
        seeds = f"{row.seeds}/{len(comparison.plan.seeds)}"
        tried = (str(row.test or "-"), str(row.validation or "-"), seeds)
        return (TITLES[row.method], *tried, *numbers, chosen or "-", row.status)

    measured = ("trained", "step", "tokens/s", "peak memory", "chosen", "status")
    held_out = f"held-out {comparison.plan.objective.name}"
    header = ("method", "test", held_out, "seeds", *measured)
    return header, [line(row) for row in comparison.rows]


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
    memory = {row.memory_method: None for row in comparison.rows if row.memory_method}
    lines += [f"Memory: {method}." for method in memory]
    if plan.config.holds_out and not plan.config.validation:
        lines.append(
            "GLUE's published validation rows are split anew by each seed, as in the paper: rows "
            "used to choose the settings with one seed are among those reported with another."
        )
    return lines


def write_report(comparison: Comparison) -> None:
    """Write ``compare.json``, ``compare.csv``, ``compare.png`` and ``report.html``."""
    import pandas

    from reft_train import reporting
    from reft_train.files import dumps, write_bytes, write_text
    from reft_train.methods import TITLES

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
        "methods": [asdict(row) for row in rows],
        "runs": runs,
        "versions": reporting.versions(),
    }
    write_text(folder / "compare.json", dumps(numbers))
    flat = pandas.json_normalize(numbers["methods"], sep="_")
    write_text(folder / "compare.csv", flat.to_csv(index=False))
    tested = any(row.test is not None for row in rows)
    points = [(row, row.test if tested else row.validation) for row in rows]
    points = [(row, value) for row, value in points if value and row.trainable is not None]
    figure = reporting.new_figure()
    axes = figure.subplots()
    counts = [row.trainable + (row.head or 0) for row, _ in points]
    for count, (row, value) in zip(counts, points, strict=True):
        deviation, label = value.deviation or 0.0, TITLES[row.method]
        axes.errorbar(count, value.mean, yerr=deviation, fmt="o", capsize=4, label=label)
    axes.set(xlabel="trained parameters", ylabel="test metric" if tested else "held-out metric")
    axes.set_xscale("log" if all(counts) else "linear")
    pngs = []
    if points:
        axes.legend()
        pngs.append(write_bytes(folder / "compare.png", reporting.to_png(figure)).read_bytes())
    sets = list(dict.fromkeys(name for row in rows for name in row.tests))
    each = [(TITLES[row.method], *(row.tests.get(name, "-") for name in sets)) for row in rows]
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
    from reft_train.compare import running
    from reft_train.models import model_config
    from reft_train.reporting import text_table
    from reft_train.search.space import small_space_of
    from reft_train.training import session

    hf_config, methods = model_config(plan.config), plan.methods
    spaces = {m: small_space_of(plan.config.replace(method=m), hf_config) for m in methods}
    try:
        how = (train or session.train, final or running.run_isolated)
        comparison = running.compare(plan, spaces, *how)
    except KeyboardInterrupt:
        text = f"interrupted; the same command resumes the comparison in {plan.folder}"
        print(text, file=sys.stderr)
        return 130
    write_report(comparison)
    print(text_table(*table(comparison)), *notes(comparison), sep="\n")
    states = [row.status for row in comparison.rows]
    return int(any(text != "ok" and not text.startswith(running.REFUSED) for text in states))
