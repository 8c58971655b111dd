"""Commands and their flags; the module of a command is imported when the command runs.

``reft-train COMMAND --help`` and wrong flags therefore need neither torch nor transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from reft_train import flags
from reft_train.config import FIELDS, Frozen, Scoring

RUN = """Train a ReFT adapter (or a PEFT baseline) on a frozen Hugging Face model and
score it on the task's test sets. Settings come from the task's recipe, then from --config, then
from flags. Under torchrun or accelerate launch several processes share the work. Ctrl-C saves a
checkpoint and prints the command that resumes the run."""
EVAL = """Score an adapter on test sets: generate answers or predict classes, apply the
task's rule, print a table with the average over sets. Writes scores.json,
predictions/<set>.jsonl and, for instruct, alpaca_eval/<set>.json."""
SEARCH = """Hyperparameter search with optuna. Each trial trains on the training rows that are
not held out and is judged on those that are; test sets are never read. Without --space, rank,
layers, positions, lr, dropout and parametrization vary, as far as the method has them; a setting
whose flag is given stays fixed. The same command again resumes a search. Writes best.yaml
(for reft-train run --config), trials.json and report.html to --output, by default runs/search."""
COMPARE = """Compare methods on one task and model. Each method gets the same budget to choose
its learning rate and size on held-out training rows; its best settings are then trained and tested
with every seed, each run in a separate process. The same command again resumes a comparison.
Writes compare.json, compare.csv, compare.png and report.html."""
DOCTOR = """Report installed packages and the backend of each operator. With --model and
--task, estimate the memory of weights, gradients and optimizer before any weight is loaded, compare
it with the machine's, and train a few steps on random text, which measures the whole. Exits with
1 when the memory does not suffice or the trial fails."""
COMPARED = ("loreft", "nodireft", "noreft", "lora", "dora", "prefix", "ia3")
# a comparison sets these itself, or chooses them for each method
_NOT_COMPARED = ("method", "recipe", "resume", "overwrite", "skip_test", "lr", "rank")
_NOT_COMPARED += ("prefix_tokens",)
EVALUATED = [*Frozen.model_fields, *Scoring.model_fields, "task", "data", "max_length", "seed"]
EVALUATED = [name for name in (*EVALUATED, "threads") if name not in ("skip_test", "pooling")]


def add_parsers(subparsers: argparse._SubParsersAction) -> None:
    """Add the commands; each sets ``run``, a function from parsed arguments to an exit code."""

    def command(name: str, module: str, text: str, about: str) -> argparse.ArgumentParser:
        def run(parsed: argparse.Namespace) -> int:
            return import_module(f"reft_train.{module}").run(parsed)

        parser = subparsers.add_parser(name, help=text, description=about)
        parser.set_defaults(run=run)
        return parser

    run = command("run", "run", "train and score an adapter on a task", RUN)
    flags.add_settings(run)
    _eval(command("eval", "evaluate", "score a run, an adapter or a frozen model", EVAL))
    text = "choose hyperparameters on held-out training rows"
    _search(command("search", "search.command", text, SEARCH))
    _compare(command("compare", "compare", "compare methods under one tuning budget", COMPARE))
    text = "check the installation, the memory that a model needs, and a few training steps"
    doctor = command("doctor", "doctor.command", text, DOCTOR)
    steps = {"type": flags.number(int, 0), "default": 10, "metavar": "N"}
    doctor.add_argument("--trial-steps", **steps, help="timed steps; 0: no trial (default: 10)")
    doctor.add_argument("--json", metavar="FILE", help="also write the results to a file")
    flags.add_settings(doctor)


def _eval(command: argparse.ArgumentParser) -> None:
    text = "a run's output folder, for settings and adapter; other flags take precedence"
    command.add_argument("--run", dest="run_folder", metavar="FOLDER", help=text)
    text = "adapter to score; none: the frozen model itself (default: that of --run)"
    command.add_argument("--adapter", metavar="FOLDER", help=text)
    text = "folder of scores and predictions (default: eval in the run's folder, or runs/eval)"
    command.add_argument("--out", metavar="FOLDER", help=text)
    flags.add_settings(command, EVALUATED)


def _add_choice(add: Callable) -> None:
    """Add the flags common to all searches: the objective and the sampler's seed."""
    text = "held-out loss or metric (default: auto, metric of a task with classes)"
    add("--objective", default="auto", metavar="NAME", help=text)
    text = "seed of the sampler (default: 0)"
    add("--sampler-seed", type=flags.SEED, default=0, metavar="N", help=text)


def _search(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("search").add_argument
    forms = "setting: {choices: [...]} or {low, high, log, step}"
    add("--space", metavar="FILE", help=f"YAML: {forms}; none: the method's default")
    text = "further entries, such as 'rank=[4, 8]'; they take precedence over --space"
    add("--vary", nargs="+", default=[], metavar="NAME=VALUES", help=text)
    text = "trials in all (default: 20)"
    add("--trials", type=flags.number(int, 1), default=20, metavar="N", help=text)
    text = "end the search after so many seconds"
    add("--timeout", type=flags.number(float, 1e-9), metavar="SECONDS", help=text)
    _add_choice(add)
    text = "stops trials early (default: median)"
    add("--pruner", choices=("median", "hyperband", "none"), default="median", help=text)
    text = "optuna's storage (default: sqlite, search.db in the output folder)"
    add("--storage", metavar="URL", help=text)
    names = [name for name in FIELDS if name not in ("resume", "skip_test")]
    flags.add_settings(command, names)


def _compare(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("comparison")
    text = f"methods; none: {' '.join(COMPARED)} (and head)"
    group.add_argument("--methods", nargs="+", metavar="METHOD", help=text)
    several = {"nargs": "+", "type": flags.SEED, "default": [42, 43, 44], "metavar": "N"}
    group.add_argument("--seeds", **several, help="seeds of the tested runs")
    budget = group.add_mutually_exclusive_group()
    text = "trials of each search (default: 8)"
    budget.add_argument("--budget-trials", type=flags.number(int, 1), metavar="N", help=text)
    text = "seconds of each method's search"
    budget.add_argument("--budget-seconds", type=flags.number(float, 1e-9), metavar="S", help=text)
    _add_choice(group.add_argument)
    flags.add_settings(command, [name for name in FIELDS if name not in _NOT_COMPARED])
