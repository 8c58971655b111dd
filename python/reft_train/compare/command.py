"""``compare``: ReFT and PEFT methods on one task and model, under one tuning budget, over
several seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from reft_train import arguments, flags
from reft_train.config import FIELDS
from reft_train.search.command import add_choice, needs_optuna

if TYPE_CHECKING:
    from reft_train.compare.plan import Plan
    from reft_train.search.space import Choices, Range

DESCRIPTION = """Compare methods on one task and model. Each method gets the same budget to choose its learning rate and size on
held-out training rows; its best settings are then trained and tested with every seed, each run in a process of its own. The
same command again goes on where it stopped. Writes compare.json, compare.csv, compare.png and report.html. Needs optuna."""
_OUTPUT = "runs/compare"
_NOT_HERE = ("method", "resume", "overwrite", "skip_test", "lr", "rank", "prefix_tokens", "recipe")


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    command = subparsers.add_parser(
        "compare", help="compare methods under one tuning budget", description=DESCRIPTION
    )
    group = command.add_argument_group("comparison")
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods; none: loreft nodireft noreft lora dora prefix ia3 (and head)",
    )
    add(
        "--seeds",
        nargs="+",
        type=arguments.count(0, 2**31 - 1),
        default=[42, 43, 44],
        metavar="N",
        help="of the tested runs",
    )
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        "--budget-trials",
        type=arguments.count(1),
        metavar="N",
        help="trials of each search (default: 8)",
    )
    budget.add_argument(
        "--budget-seconds", type=arguments.rate, metavar="S", help="seconds of each method's search"
    )
    add_choice(add)
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_HERE])
    command.set_defaults(run=run)


def resolve_plan(parsed: argparse.Namespace) -> Plan:
    """The comparison that the flags ask for.

    Raises:
        UserError: bad input.
    """
    from reft_train.compare.plan import Plan, methods_of
    from reft_train.errors import UserError
    from reft_train.search.objective import resolve

    if parsed.config is None and "output" not in parsed:
        parsed.output = _OUTPUT
    objective, config = resolve(flags.settings(parsed), parsed.objective)
    if len(set(parsed.seeds)) < len(parsed.seeds):
        raise UserError(f"--seeds: got {' '.join(map(str, parsed.seeds))}, expected each seed once")
    trials = None if parsed.budget_seconds is not None else parsed.budget_trials or 8
    return Plan(
        config=config,
        methods=methods_of(config, parsed.methods),
        objective=objective,
        seeds=tuple(parsed.seeds),
        trials=trials,
        seconds=parsed.budget_seconds,
        sampler_seed=parsed.sampler_seed,
    )


def spaces_of(plan: Plan) -> dict[str, dict[str, Choices | Range]]:
    """What each method's search varies.

    Raises:
        UserError: a model that cannot be read.
    """
    from reft_train.models import model_config
    from reft_train.search.defaults import small_space_of

    hf_config = model_config(plan.config)
    return {
        method: small_space_of(plan.config.replace(method=method), hf_config)
        for method in plan.methods
    }


def run(
    parsed: argparse.Namespace, train: Callable | None = None, final: Callable | None = None
) -> int:
    """The command: 0, or 1 when a method or a run failed (one that the model cannot have is none),
    or 130 after Ctrl-C.

    Args:
        train: in place of :func:`reft_train.training.session.train`. final: in place of a process
            for each tested run.

    Raises:
        UserError: bad input.
    """
    needs_optuna()
    plan = resolve_plan(parsed)
    spaces = spaces_of(plan)
    if train is None:
        from reft_train.training.session import train
    from reft_train.compare import report
    from reft_train.compare.isolated import run_isolated
    from reft_train.compare.running import compare

    try:
        found = compare(plan, spaces, train, run_isolated if final is None else final)
    except KeyboardInterrupt:
        print(
            f"interrupted: what is done is kept in {plan.folder}; the same command goes on",
            file=sys.stderr,
        )
        return 130
    report.write(found)
    print(report.text(found))
    print("\n".join(report.notes(found)))
    return int(
        any(row.status != "ok" and not row.status.startswith("not available") for row in found.rows)
    )
