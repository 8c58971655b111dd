"""Commands and their flags; the module of a command is imported when the command runs.

``reft-train COMMAND --help`` and wrong flags therefore need neither torch nor transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from reft_train import flags
from reft_train.config import FIELDS, Frozen, Scoring, Settings, setting

COMPARED = ("loreft", "nodireft", "noreft", "lora", "dora", "prefix", "ia3")
CHAT_HELP = "/base: the frozen model, /adapter: the adapter again, /reset: forget, /quit: leave"
# a comparison sets these itself, or chooses them for each method
_NOT_COMPARED = ("method", "recipe", "resume", "overwrite", "skip_test", "lr", "rank")
_NOT_COMPARED += ("prefix_tokens",)
EVALUATED = [*Frozen.model_fields, *Scoring.model_fields, "task", "data", "max_length", "seed"]
EVALUATED = [name for name in (*EVALUATED, "threads") if name not in ("skip_test", "pooling")]


class Evaluated(Settings):
    """What ``eval`` scores, and where its scores go."""

    run: str | None = setting(None, "a run's output folder, for settings and adapter")
    adapter: str | None = setting(None, "adapter to score; none: the frozen model (or --run's)")
    out: str | None = setting(None, "of scores (or eval in the run's folder, or runs/eval)")


class Choice(Settings):
    """What trials are compared by, and how they are sampled."""

    objective: str = setting("auto", "held-out loss or metric; auto: metric of tasks with classes")
    sampler_seed: int = setting(0, "seed of the sampler", ge=0, lt=2**31)


class SearchOptions(Choice):
    """What ``search`` varies, and how often."""

    vary: list[str] = setting([], "what varies, such as 'rank=[4, 8]' 'lr={low: 1e-4, high: 1e-2}'")
    trials: int = setting(20, "trials in all", ge=1)


class CompareOptions(Choice):
    """What ``compare`` compares, and the budget of each search."""

    methods: list[str] = setting([], f"methods; none: {' '.join(COMPARED)} (and head)")
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = setting([42, 43, 44], "of tested runs")
    budget_trials: int = setting(8, "trials of each search", ge=1)


class ChatOptions(Settings):
    """Whom ``chat`` talks to, and how answers are decoded."""

    adapter: str = setting(..., "the adapter's folder")
    model: str | None = setting(None, "folder or hub name; none: the one the adapter names")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda if available")
    max_new_tokens: int = setting(200, "tokens of an answer", ge=1)
    temperature: float = setting(0.0, "of sampling; 0: greedy", ge=0)
    seed: int = setting(42, "of sampling", ge=0, lt=2**31)


class Command(NamedTuple):
    """A module with ``run``, a function from parsed flags to an exit code, and its flags."""

    module: str
    title: str
    about: str
    options: type[Settings] = Settings
    settings: Sequence[str] = ()


COMMANDS = {
    "run": Command(
        "run",
        "train and score an adapter on a task",
        """Train a ReFT adapter (or a PEFT baseline) on a frozen Hugging Face model and score it on
        the task's test sets. Settings come from the task's recipe, then from --config, then from
        flags. Under torchrun or accelerate launch several processes share the work. Ctrl-C saves a
        checkpoint and prints the command that resumes the run.""",
        settings=tuple(FIELDS),
    ),
    "eval": Command(
        "evaluate",
        "score a run, an adapter or a frozen model",
        """Score an adapter on test sets: generate answers or predict classes, apply the task's
        rule, print a table with the average over sets. Writes scores.json and
        predictions/<set>.jsonl.""",
        Evaluated,
        EVALUATED,
    ),
    "search": Command(
        "search.command",
        "choose hyperparameters on held-out training rows",
        """Hyperparameter search with optuna. Each trial trains on the training rows that are not
        held out and is judged on those that are; test sets are never read. Without --vary, rank,
        layers, positions, lr, dropout and parametrization vary, as far as the method has them; a
        setting whose flag is given stays fixed. The same command again resumes a search. Writes
        best.yaml (for reft-train run --config), trials.csv and search.db, which optuna-dashboard
        shows, to --output, by default runs/search.""",
        SearchOptions,
        [name for name in FIELDS if name not in ("resume", "skip_test")],
    ),
    "compare": Command(
        "compare",
        "compare methods under one tuning budget",
        """Compare methods on one task and model. Each method gets the same budget to choose its
        learning rate and size on held-out training rows; its best settings are then trained and
        tested with every seed, each run in a separate process. The same command again resumes a
        comparison. Prints means and sample standard deviations over the seeds. Writes
        compare.json and compare.csv to --output, by default runs/compare.""",
        CompareOptions,
        [name for name in FIELDS if name not in _NOT_COMPARED],
    ),
    "chat": Command(
        "chat",
        "talk to a model with an adapter in the terminal",
        f"Answers stream to the terminal; lines may also be piped in. {CHAT_HELP}.",
        ChatOptions,
    ),
}


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands; each sets ``execute``, a function from parsed flags to an exit code."""
    for name, command in COMMANDS.items():
        parser = subparsers.add_parser(name, help=command.title, description=command.about)
        parser.set_defaults(execute=partial(_run, command.module))
        flags.add_flags(parser.add_argument_group(name), command.options.model_fields)
        if command.settings:
            flags.add_settings(parser, command.settings)


def _run(module: str, parsed: argparse.Namespace) -> int:
    return import_module(f"reft_train.{module}").run(parsed)
