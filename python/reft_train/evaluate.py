"""``eval``: score a finished run, an adapter or a frozen model on test sets."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from reft_train import flags, tasks
from reft_train.config import RunConfig, build, read_yaml
from reft_train.errors import UserError
from reft_train.files import check_folder, read_object

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
DESCRIPTION = """Score an adapter on test sets: generate answers or predict classes, apply the
task's rule, print a table with the average over sets. Writes scores.json,
predictions/<set>.jsonl and, for instruct, alpaca_eval/<set>.json."""


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
    """Run the command. Bad input raises an error before any file is written."""
    config, adapter = resolve_settings(parsed), resolve_adapter(parsed)
    base = Path("runs" if parsed.run_folder is None else parsed.run_folder)
    out = base / "eval" if parsed.out is None else Path(parsed.out)
    check_folder(out, "--out")
    from reft_train import methods, models
    from reft_train.training.prepare import find_rows

    if parsed.run_folder is not None:  # a frozen model without an adapter can be any model
        if config.model == read_yaml(base / CONFIG).get("model"):
            models.check_reachable(config, base)
        if parsed.adapter is None:
            methods.check_run_base(config, base, models.model_config(config))
    task = tasks.get(config.task)
    sets = find_rows(config.replace(train=None, skip_test=False), task, train=False).tests
    if adapter is not None:
        # checked before the weights are loaded, which is slow
        methods.check_base(models.model_config(config), adapter)
    return _score(config, task, sets, adapter, out)


def resolve_settings(parsed: argparse.Namespace) -> RunConfig:
    """Merge the settings of the run, the file and the flags; later ones override earlier ones."""
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
    merged: dict[str, Any] = {}
    for layer in (*layers, flags.passed(parsed)):
        if "data" in layer and "test" not in layer:
            # otherwise the run's test files would take precedence over the requested folder
            merged.pop("test", None)
        merged.update(layer)
    if not merged.get("model") and parsed.adapter not in (None, FROZEN):
        path = resolve_adapter(parsed) / "adapter_config.json"
        merged["model"] = read_object(path, "--adapter").get("base_model_name_or_path")
    if not merged.get("model"):
        raise UserError("--model: got none, expected a model's folder or hub name, or --run FOLDER")
    return build(merged)


def resolve_adapter(parsed: argparse.Namespace) -> Path | None:
    """Return the adapter's folder, or None for the frozen model."""
    if parsed.adapter == FROZEN:
        return None
    if parsed.adapter is None and parsed.run_folder is None:
        expected = "an adapter's folder, none for the frozen model, or --run FOLDER"
        raise UserError(f"--adapter: got nothing, expected {expected}")
    folder = Path(parsed.run_folder) / ADAPTER if parsed.adapter is None else Path(parsed.adapter)
    if not (folder / "adapter_config.json").is_file():
        name = "--run" if parsed.adapter is None else "--adapter"
        raise UserError(
            f"{name}: got {folder}, without an adapter_config.json, expected an adapter that a "
            "run saved"
        )
    return folder


def _score(
    config: RunConfig, task: Any, sets: dict[str, list], adapter: Path | None, out: Path
) -> int:
    import torch
    from accelerate import PartialState

    from reft_train import models
    from reft_train.evaluation import scoring, writing
    from reft_train.methods import load_adapter

    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = models.pick_device(config)
    state, loaded = PartialState(cpu=device == "cpu"), models.load(config, task)
    if adapter is not None:
        loaded = replace(loaded, model=load_adapter(loaded, adapter))
    if config.device_map == "none" and config.quantization == "none":
        loaded.model.to(state.device if state.num_processes > 1 else device)
    scores = [scoring.score_set(name, rows, loaded, task, config) for name, rows in sets.items()]
    if not state.is_main_process:
        return 0
    settings = {name: getattr(config, name) for name in SETTINGS if name not in ("model", "task")}
    about = {
        "model": config.model,
        "adapter": None if adapter is None else str(adapter),
        "task": task.name,
    }
    writing.write_predictions(out, scores)
    if not task.metrics:
        writing.write_alpaca_eval(
            out, scores, Path(config.model).name + ("" if adapter is None else "-reft")
        )
        print("not scored here: the answers in alpaca_eval go to its judge", file=sys.stderr)
    writing.write_scores(out, scores, {**about, "settings": settings})
    print(scoring.render(scores))
    print(f"written to {out}")
    return 0
