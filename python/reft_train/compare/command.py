"""``compare``: ReFT and PEFT methods on one task and model, with one tuning budget and seeds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from reft_train import flags, tasks
from reft_train.config import FIELDS, METHODS, RunConfig
from reft_train.errors import UserError
from reft_train.search.command import add_choice, one_process

if TYPE_CHECKING:
    from reft_train.compare.running import ComparisonPlan

DESCRIPTION = """Compare methods on one task and model. Each method gets the same budget to choose
its learning rate and size on held-out training rows; its best settings are then trained and tested
with every seed, each run in a process of its own. The same command again goes on where it stopped.
Writes compare.json, compare.csv, compare.png and report.html."""
DEFAULT = ("loreft", "nodireft", "noreft", "lora", "dora", "prefix", "ia3")
_NOT_HERE = ("method", "resume", "overwrite", "skip_test", "lr", "rank", "prefix_tokens", "recipe")


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    command = subparsers.add_parser(
        "compare", help="compare methods under one tuning budget", description=DESCRIPTION
    )
    group = command.add_argument_group("comparison")
    text = f"methods; none: {' '.join(DEFAULT)} (and head)"
    group.add_argument("--methods", nargs="+", metavar="METHOD", help=text)
    group.add_argument(
        "--seeds",
        nargs="+",
        type=flags.SEED,
        default=[42, 43, 44],
        metavar="N",
        help="of the tested runs",
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget-trials",
        type=flags.count(1),
        metavar="N",
        help="trials of each search (default: 8)",
    )
    budget.add_argument(
        "--budget-seconds", type=flags.rate, metavar="S", help="seconds of each method's search"
    )
    add_choice(group.add_argument)
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_HERE])
    command.set_defaults(run=run)


def resolve_plan(parsed: argparse.Namespace) -> ComparisonPlan:
    """Build the comparison plan from the flags."""
    from reft_train.compare.running import ComparisonPlan
    from reft_train.search.objective import resolve

    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/compare"
    objective, config = resolve(flags.settings(parsed), parsed.objective)
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise UserError(f"--seeds: got {' '.join(map(str, parsed.seeds))}, expected each seed once")
    trials = None if parsed.budget_seconds is not None else parsed.budget_trials or 8
    methods, seeds = _methods(config, parsed.methods), tuple(parsed.seeds)
    return ComparisonPlan(
        config, methods, objective, seeds, trials, parsed.budget_seconds, parsed.sampler_seed
    )


def _methods(config: RunConfig, requested: Sequence[str] | None) -> tuple[str, ...]:
    if requested is None:
        return DEFAULT if tasks.get(config.task).decoding is not None else (*DEFAULT, "head")
    for method in requested:
        if method not in METHODS:
            raise UserError(f"--methods: got {method!r}, expected some of {', '.join(METHODS)}")
    if len(set(requested)) < len(requested):
        raise UserError(f"--methods: got {' '.join(requested)}, expected each method once")
    return tuple(requested)


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
    from reft_train.compare import report, running
    from reft_train.models import model_config
    from reft_train.search.space import small_space_of
    from reft_train.training import session

    hf_config = model_config(plan.config)
    spaces = {
        method: small_space_of(plan.config.replace(method=method), hf_config)
        for method in plan.methods
    }
    try:
        comparison = running.compare(
            plan, spaces, train or session.train, final or running.run_isolated
        )
    except KeyboardInterrupt:
        print(
            f"interrupted: what is done is kept in {plan.folder}; the same command goes on",
            file=sys.stderr,
        )
        return 130
    report.write(comparison)
    print(report.text(comparison), *report.notes(comparison), sep="\n")
    return int(
        any(
            row.status != "ok" and not row.status.startswith("not available")
            for row in comparison.rows
        )
    )
