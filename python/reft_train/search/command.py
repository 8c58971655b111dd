"""``search``: choose rank, layers, positions, learning rate and more on held-out training rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_train import arguments, flags
from reft_train.config import FIELDS, RunConfig
from reft_train.errors import UserError

if TYPE_CHECKING:
    from reft_train.search.space import Choices, Range

DESCRIPTION = """Hyperparameter search with optuna. Each trial trains on the training rows that are not held out and is judged
on those that are; test sets are never read. Without --space, rank, layers, positions, lr, dropout and parametrization vary, as
far as the method has them; a setting whose flag is given stays fixed. The same command again goes on where it stopped. Writes
best.yaml (for reft-train run --config), trials.json and report.html to --output, by default runs/search. Needs optuna."""
_OUTPUT = "runs/search"
_NOT_HERE = ("resume", "skip_test")


def add_choice(add: Callable) -> None:
    """Add what any search is told: by what it judges trials, and the seed of the sampler that
    proposes them.
    """
    add(
        "--objective",
        default="auto",
        metavar="NAME",
        help="held-out loss or metric (default: auto, metric of a task with classes)",
    )
    add(
        "--sampler-seed",
        type=arguments.count(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="of the choice of trials (default: 0)",
    )


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    command = subparsers.add_parser(
        "search", help="choose hyperparameters on held-out training rows", description=DESCRIPTION
    )
    add = command.add_argument_group("search").add_argument
    add(
        "--space",
        metavar="FILE",
        help=(
            "YAML: setting: {choices: [...]} or {low, high, log, step}; none: the method's default"
        ),
    )
    add(
        "--vary",
        nargs="+",
        default=[],
        metavar="NAME=VALUES",
        help="more of the same, such as 'rank=[4, 8]'; wins over --space",
    )
    add(
        "--trials",
        type=arguments.count(1),
        default=20,
        metavar="N",
        help="trials in all (default: 20)",
    )
    add("--timeout", type=arguments.rate, metavar="SECONDS", help="end the search after so long")
    add_choice(add)
    add(
        "--pruner",
        choices=("median", "hyperband", "none"),
        default="median",
        help="ends hopeless trials (default: median)",
    )
    add(
        "--storage",
        metavar="URL",
        help="optuna's storage (default: sqlite, search.db in the output folder)",
    )
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_HERE])
    command.set_defaults(run=run)


def resolve_space(parsed: argparse.Namespace, config: RunConfig) -> dict[str, Choices | Range]:
    """The space of file and flags, or the method's default without the settings that a flag fixes.

    Raises:
        UserError: a wrong entry, a setting that is varied and given, or nothing to vary.
    """
    from reft_train.search import space

    fixed = flags.given(parsed)
    stated: dict[str, Choices | Range] = (
        {} if parsed.space is None else space.read(parsed.space, config.method)
    )
    if parsed.vary:
        stated.update(space.parse_flags(parsed.vary, config.method))
    for name in stated:
        if name in fixed:
            raise UserError(
                f"--{name.replace('_', '-')}: got {fixed[name]!r}, but the search varies it, "
                "expected one of the two"
            )
    if parsed.space is not None:
        return stated
    default = {name: entry for name, entry in _default(config).items() if name not in fixed}
    if not {**default, **stated}:
        raise UserError(
            "--vary: got nothing to vary, expected settings such as 'lr={low: 1e-4, high: 1e-2, "
            "log: true}'"
        )
    return {**default, **stated}


def _default(config: RunConfig) -> dict[str, Choices | Range]:
    from reft_train import tasks
    from reft_train.models import CLASSIFICATION, kind_of, model_config
    from reft_train.search.defaults import space_of

    hf_config = model_config(config)
    return space_of(
        config, hf_config, kind_of(config, hf_config, tasks.get(config.task)) == CLASSIFICATION
    )


def needs_optuna() -> None:
    """Refuse to go on without optuna, or as one of several processes.

    Raises:
        UserError: so.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise UserError("optuna: got no such package, expected it installed: pip install optuna")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE: got more than one process, expected one: trials are run in turn"
        )


def run(parsed: argparse.Namespace, train: Callable | None = None) -> int:
    """The command: 0, or 1 when no trial finished, or 130 after Ctrl-C.

    Args:
        train: in place of :func:`reft_train.training.session.train`.

    Raises:
        UserError: bad input, or what the first trial refuses.
    """
    needs_optuna()
    if parsed.config is None and "output" not in parsed:
        parsed.output = _OUTPUT
    config = flags.settings(parsed)
    from reft_train.search.objective import resolve

    objective, config = resolve(config, parsed.objective)
    space = resolve_space(parsed, config)
    if train is None:
        from reft_train.training.session import train
    from reft_train.search import report
    from reft_train.search.study import BEST, Plan, search

    plan = Plan(
        config,
        space,
        objective,
        parsed.trials,
        parsed.timeout,
        parsed.storage,
        parsed.pruner,
        parsed.sampler_seed,
    )
    found = search(plan, train)
    report.write(found)
    print(report.text(found))
    if found.interrupted:
        print(f"interrupted: the search is kept in {plan.folder}; the same command goes on")
        return 130
    if found.best is None:
        print("no trial has finished; the reasons are above and in trials.json")
        return 1
    print(
        f"best: trial {found.best.number}; train and test it with: reft-train run --config "
        f"{plan.folder / BEST}"
    )
    return 0
