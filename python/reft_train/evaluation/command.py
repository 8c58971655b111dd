"""``eval``: score a finished run, an adapter or a frozen model on test sets.

Here are the command's flags and their checks; :mod:`reft_train.evaluation.scoring` does the work.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train import flags
from reft_train.config import RunConfig, build, read_yaml
from reft_train.errors import UserError

if TYPE_CHECKING:
    from reft_train.models import Loaded
    from reft_train.tasks.base import Task

SETTINGS = (
    "model",
    "task",
    "data",
    "test",
    "test_rows",
    "max_length",
    "eval_batch_size",
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_beams",
    "seed",
    "architecture",
    "dtype",
    "quantization",
    "device",
    "device_map",
    "attention",
    "liger",
    "threads",
)
CONFIG, ADAPTER, FROZEN = "config.yaml", "adapter", "none"
DESCRIPTION = """Score an adapter on test sets: generate answers or predict classes, apply the task's rule, print a table with
the average over sets. Writes scores.json, predictions/<set>.jsonl and, for instruct, alpaca_eval/<set>.json."""


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    command = subparsers.add_parser(
        "eval", help="score a run, an adapter or a frozen model", description=DESCRIPTION
    )
    text = "a run's output folder: settings and adapter are taken from there, other flags win"
    command.add_argument("--run", dest="run_folder", metavar="FOLDER", help=text)
    text = "adapter to score; none: the frozen model itself (default: that of --run)"
    command.add_argument("--adapter", metavar="FOLDER", help=text)
    text = "where scores and predictions go (default: eval in the run's folder, or runs/eval)"
    command.add_argument("--out", metavar="FOLDER", help=text)
    flags.add_settings(command, SETTINGS)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """The command.

    Raises:
        UserError: bad input; nothing is written then.
    """
    config = resolve_settings(parsed)
    adapter = resolve_adapter(parsed)
    out = resolve_out(parsed)
    from reft_train import tasks
    from reft_train.training.prepare import find_rows

    _check_run_model(parsed, config)
    task = tasks.get(config.task)
    sets = find_rows(config.replace(train=None, skip_test=False), task, train=False).tests
    if adapter is not None:
        from reft_train.methods import check_base
        from reft_train.models import model_config

        check_base(model_config(config), adapter)  # before the weights, which take their time
    return _score(config, task, sets, adapter, out)


def _check_run_model(parsed: argparse.Namespace, config: RunConfig) -> None:
    """Refuse a run's model that is gone, or another one in its place; the frozen model alone may
    be any.
    """
    if parsed.run_folder is None:
        return
    from reft_train.methods import check_run_base
    from reft_train.models import check_reachable, model_config

    run_folder = Path(parsed.run_folder)
    if config.model == read_yaml(run_folder / CONFIG).get("model"):
        check_reachable(config, run_folder)
    if parsed.adapter is None:
        check_run_base(config, run_folder, model_config(config))


def resolve_settings(parsed: argparse.Namespace) -> RunConfig:
    """Settings of the run, the file and the flags, later ones over earlier ones.

    Raises:
        UserError: a folder that is no run's, no model or no task, or wrong values.
    """
    layers: list[dict[str, Any]] = []
    if parsed.run_folder is not None:
        path = Path(parsed.run_folder) / CONFIG
        if not path.is_file():
            raise UserError(
                f"--run: got {parsed.run_folder}, without a {CONFIG}, expected a run's output "
                "folder"
            )
        layers.append(read_yaml(path))
    if parsed.config is not None:
        layers.append(read_yaml(parsed.config))
    layers.append(flags.given(parsed))
    merged: dict[str, Any] = {}
    for layer in layers:
        if "data" in layer and "test" not in layer:
            merged.pop(
                "test", None
            )  # test files of the run would win over the folder that is asked for now
        merged.update(layer)
    if not merged.get("model"):
        raise UserError("--model: got none, expected a model's folder or hub name, or --run FOLDER")
    return build(merged)


def resolve_adapter(parsed: argparse.Namespace) -> Path | None:
    """The adapter's folder; None for the frozen model.

    Raises:
        UserError: none is named, or there is none.
    """
    if parsed.adapter == FROZEN:
        return None
    if parsed.adapter is None and parsed.run_folder is None:
        raise UserError(
            "--adapter: got nothing, expected an adapter's folder, none for the frozen model, or "
            "--run FOLDER"
        )
    folder = Path(parsed.run_folder) / ADAPTER if parsed.adapter is None else Path(parsed.adapter)
    if not (folder / "adapter_config.json").is_file():
        name = "--run" if parsed.adapter is None else "--adapter"
        raise UserError(
            f"{name}: got {folder}, without an adapter_config.json, expected an adapter that a "
            "run saved"
        )
    return folder


def resolve_out(parsed: argparse.Namespace) -> Path:
    """The output folder, not made yet.

    Raises:
        UserError: a file stands in the way, or nothing can be written there.
    """
    from reft_train.files import check_folder

    out = Path("runs") if parsed.run_folder is None else Path(parsed.run_folder)
    out = out / "eval" if parsed.out is None else Path(parsed.out)
    check_folder(out, "--out")
    return out


def load_scored(config: RunConfig, task: Task, adapter: Path | None) -> Loaded:
    """The model with its adapter, on the device of this process.

    Raises:
        UserError: a model or an adapter that cannot be loaded.
    """
    from accelerate import PartialState

    from reft_train import models
    from reft_train.methods import load_adapter

    kind = models.pick_device(config)
    state = PartialState(cpu=kind == "cpu")
    loaded = models.load(config, task)
    if adapter is not None:
        loaded = replace(loaded, model=load_adapter(loaded, adapter))
    if config.device_map == "none" and config.quantization == "none":
        loaded.model.to(state.device if state.num_processes > 1 else kind)
    return loaded


def _score(
    config: RunConfig, task: Task, sets: dict[str, list], adapter: Path | None, out: Path
) -> int:
    import torch
    from accelerate import PartialState

    from reft_train.evaluation.scoring import score_set
    from reft_train.evaluation.table import render
    from reft_train.evaluation.writing import write_alpaca_eval, write_predictions, write_scores

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    loaded = load_scored(config, task, adapter)
    scores = [score_set(name, rows, loaded, task, config) for name, rows in sets.items()]
    if not PartialState().is_main_process:
        return 0
    about = {
        "model": config.model,
        "adapter": None if adapter is None else str(adapter),
        "task": task.name,
        "settings": {
            name: getattr(config, name) for name in SETTINGS if name not in ("model", "task")
        },
    }
    write_predictions(out, scores)
    if not task.metrics:
        write_alpaca_eval(
            out,
            scores,
            Path(config.model).name if adapter is None else f"{Path(config.model).name}-reft",
        )
        print("not scored here: the answers in alpaca_eval go to its judge", file=sys.stderr)
    write_scores(out, scores, about)
    print(render(scores))
    print(f"written to {out}")
    return 0
