"""``eval``: score a finished run, an adapter or a frozen model on test sets."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from reft_train import flags, methods, models, tasks
from reft_train.commands import EVALUATED, Evaluated
from reft_train.config import RunConfig, build, read_yaml
from reft_train.errors import wrong
from reft_train.evaluation import scoring
from reft_train.files import check_folder
from reft_train.training.prepare import find_rows
from reft_train.training.run_dir import ADAPTER, CONFIG

FROZEN = "none"


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Bad input raises an error before any file is written."""
    options = flags.options(parsed, Evaluated)
    base, adapter = None if options.run is None else Path(options.run), None
    config = resolve_settings(parsed, options)
    if options.adapter is None and base is not None:
        adapter = adapter_folder(base / ADAPTER, "--run")
    else:
        adapter = adapter_folder(options.adapter)
    out = (base or Path("runs")) / "eval" if options.out is None else Path(options.out)
    check_folder(out, "--out")
    if base is not None and options.adapter is None:
        # otherwise it is any adapter, or any frozen model
        methods.check_base(models.model_config(config), base, "model")
    task = tasks.get(config.task)
    sets = find_rows(config.replace(train=None, skip_test=False), task, train=False).tests
    if adapter is not None:
        # checked before the weights are loaded, which is slow
        methods.check_base(models.model_config(config), adapter)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = models.pick_device(config)
    state, loaded = PartialState(cpu=device == "cpu"), models.load(config, task)
    if adapter is not None:
        loaded = replace(loaded, model=methods.load_adapter(loaded, adapter))
    if config.device_map == "none" and config.quantization == "none":
        loaded.model.to(state.device if state.num_processes > 1 else device)
    scores = [scoring.score_set(name, rows, loaded, task, config) for name, rows in sets.items()]
    if not state.is_main_process:
        return 0
    scoring.write_predictions(out, scores)
    about = {"model": config.model, "task": task.name, "adapter": adapter and str(adapter)}
    settings = {name: getattr(config, name) for name in EVALUATED if name not in about}
    scoring.write_scores(out, scores, {**about, "settings": settings})
    print(scoring.render(scores))
    if not task.metrics:
        print("not scored: predictions/ has the answers for a judge", file=sys.stderr)
    print(f"written to {out}")
    return 0


def resolve_settings(parsed: argparse.Namespace, options: Evaluated) -> RunConfig:
    """Merge the settings of the run, the file and the flags; later ones override earlier ones."""
    layers = []
    if options.run is not None:
        path = Path(options.run) / CONFIG
        if not path.is_file():
            raise wrong("--run", f"{options.run}, without a {CONFIG}", "a run's output folder")
        layers.append(read_yaml(path))
    if parsed.config is not None:
        layers.append(read_yaml(parsed.config))
    merged: dict[str, Any] = {}
    for layer in (*layers, flags.passed(parsed)):
        if "data" in layer and "test" not in layer:
            # otherwise the run's test files would take precedence over the requested folder
            merged.pop("test", None)
        merged.update(layer)
    if not merged.get("model") and options.adapter not in (None, FROZEN):
        merged["model"] = methods.base_model(adapter_folder(options.adapter))
    if not merged.get("model"):
        raise wrong("--model", "none", "a model's folder or hub name, or --run FOLDER")
    return build(merged)


def adapter_folder(given: str | Path | None, flag: str = "--adapter") -> Path | None:
    """Return the folder of a saved adapter, or None for the frozen model ("none")."""
    if given is None:
        expected = "an adapter's folder, none for the frozen model, or --run FOLDER"
        raise wrong(flag, "nothing", expected)
    if given == FROZEN:
        return None
    if not (Path(given) / "adapter_config.json").is_file():
        raise wrong(flag, f"{given}, without an adapter_config.json", "a saved adapter")
    return Path(given)
