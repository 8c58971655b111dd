"""``search``: optimize rank, layers, positions, learning rate and more on held-out rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_train import flags
from reft_train.config import FIELDS, RunConfig
from reft_train.errors import UserError

if TYPE_CHECKING:
    from reft_train.search.space import Space

DESCRIPTION = """Hyperparameter search with optuna. Each trial trains on the training rows that are
not held out and is judged on those that are; test sets are never read. Without --space, rank,
layers, positions, lr, dropout and parametrization vary, as far as the method has them; a setting
whose flag is given stays fixed. The same command again goes on where it stopped. Writes best.yaml
(for reft-train run --config), trials.json and report.html to --output, by default runs/search."""
_NOT_HERE = ("resume", "skip_test")


def add_choice(add: Callable) -> None:
    """Add the flags common to all searches: the objective and the sampler's seed."""
    text = "held-out loss or metric (default: auto, metric of a task with classes)"
    add("--objective", default="auto", metavar="NAME", help=text)
    add(
        "--sampler-seed",
        type=flags.SEED,
        default=0,
        metavar="N",
        help="of the choice of trials (default: 0)",
    )


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    summary = "choose hyperparameters on held-out training rows"
    command = subparsers.add_parser("search", help=summary, description=DESCRIPTION)
    add = command.add_argument_group("search").add_argument
    forms = "setting: {choices: [...]} or {low, high, log, step}"
    add("--space", metavar="FILE", help=f"YAML: {forms}; none: the method's default")
    text = "more of the same, such as 'rank=[4, 8]'; wins over --space"
    add("--vary", nargs="+", default=[], metavar="NAME=VALUES", help=text)
    add(
        "--trials", type=flags.count(1), default=20, metavar="N", help="trials in all (default: 20)"
    )
    add("--timeout", type=flags.rate, metavar="SECONDS", help="end the search after so long")
    add_choice(add)
    text = "ends hopeless trials (default: median)"
    add("--pruner", choices=("median", "hyperband", "none"), default="median", help=text)
    add(
        "--storage",
        metavar="URL",
        help="optuna's storage (default: sqlite, search.db in the output folder)",
    )
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_HERE])
    command.set_defaults(run=run)


def resolve_space(parsed: argparse.Namespace, config: RunConfig) -> Space:
    """Return the search space of file and flags.

    The default is the method's space without the settings that flags fix.
    """
    from reft_train import models, tasks
    from reft_train.search import space

    fixed, requested = flags.passed(parsed), {}
    if parsed.space is not None:
        requested |= space.read(parsed.space, config.method)
    if parsed.vary:
        requested |= space.parse_flags(parsed.vary, config.method)
    for name in requested:
        if name in fixed:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{flag}: got {fixed[name]!r}, but the search varies it, expected one of the two"
            )
    if parsed.space is not None:
        return requested
    hf_config = models.model_config(config)
    encoder = models.kind_of(config, hf_config, tasks.get(config.task)) == models.CLASSIFICATION
    default = space.space_of(config, hf_config, encoder)
    varied = {**{name: entry for name, entry in default.items() if name not in fixed}, **requested}
    if not varied:
        expected = "settings such as 'lr={low: 1e-4, high: 1e-2, log: true}'"
        raise UserError(f"--vary: got nothing to vary, expected {expected}")
    return varied


def one_process() -> None:
    """Raise UserError if there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE: got more than one process, expected one: trials are run in turn"
        )


def run(parsed: argparse.Namespace, train: Callable | None = None) -> int:
    """Run the command. Returns 0, 1 when no trial finished, or 130 after Ctrl-C.

    Args:
        train: replaces :func:`reft_train.training.session.train`.
    """
    one_process()
    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/search"
    config = flags.settings(parsed)
    from reft_train.reporting.page import text_table
    from reft_train.search import report, study
    from reft_train.search.objective import resolve
    from reft_train.training import session

    objective, config = resolve(config, parsed.objective)
    plan = study.SearchPlan(
        config,
        resolve_space(parsed, config),
        objective,
        parsed.trials,
        parsed.timeout,
        parsed.storage,
        parsed.pruner,
        parsed.sampler_seed,
    )
    result = study.search(plan, train or session.train)
    report.write(result)
    print(text_table(*report.table(result)))
    if result.interrupted:
        print(f"interrupted: the search is kept in {plan.folder}; the same command goes on")
        return 130
    if result.best is None:
        print(f"no trial has finished; the reasons are above and in {study.TRIALS}")
        return 1
    path = plan.folder / study.BEST
    print(
        f"best: trial {result.best.number}; train and test it with: reft-train run --config {path}"
    )
    return 0
