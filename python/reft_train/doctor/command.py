"""``doctor``: environment report, memory estimate for a model, and a short trial training."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train import flags
from reft_train.config import RunConfig
from reft_train.errors import wrong

if TYPE_CHECKING:
    from reft_train.doctor.estimate import Estimate
    from reft_train.doctor.trial import Trial

DESCRIPTION = """Report installed packages and the backend of each operator. With --model and
--task, estimate the memory of weights, gradients and optimizer before any weight is loaded, compare
it with the machine's, and train a few steps on random text, which measures the whole. Exits with
1 when the memory does not suffice or the trial fails."""


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    summary = "check the installation, the memory that a model needs, and a few training steps"
    command = subparsers.add_parser("doctor", help=summary, description=DESCRIPTION)
    text = "timed steps; 0: no trial (default: 10)"
    steps = {"type": flags.number(int, 0), "default": 10, "metavar": "N"}
    command.add_argument("--trial-steps", **steps, help=text)
    command.add_argument("--json", metavar="FILE", help="also write the results to a file")
    flags.add_settings(command)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 when memory is insufficient or the trial failed."""
    if parsed.json is not None and Path(parsed.json).is_dir():
        raise wrong("--json", f"{parsed.json}, which is a folder", "a file")
    config = None
    if parsed.config is not None or "model" in parsed:
        config = flags.settings(parsed)
    elif extra := sorted(flags.passed(parsed), key="task".__eq__):
        name = extra[0].replace("_", "-")
        raise wrong("--model", f"none with --{name}", "a model's folder or hub name")
    from reft_train.doctor.environment import environment, environment_lines
    from reft_train.files import dumps, write_text

    report: dict[str, Any] = {"environment": environment()}
    print("", *environment_lines(report["environment"]), sep="\n", flush=True)
    code = 0 if config is None else _examine(config, parsed.trial_steps, report)
    if parsed.json is not None:
        print(f"written: {write_text(Path(parsed.json), dumps(report))}")
    return code


def _examine(config: RunConfig, steps: int, report: dict[str, Any]) -> int:
    from reft_train import models, tasks
    from reft_train.doctor import environment
    from reft_train.doctor.estimate import estimate
    from reft_train.doctor.trial import run_trial

    task, device = tasks.get(config.task), models.pick_device(config)
    needed = estimate(config, task)
    memory = environment.memory_of(device, spread=config.device_map == "auto")
    report["settings"] = config.to_dict()
    report["estimate"] = {**asdict(needed), "total": needed.total}
    report["memory"] = {"device": device, **asdict(memory)}
    print("", *estimate_lines(needed), sep="\n")
    enough = needed.total <= memory.free
    free = f"{size(memory.free)} free of {size(memory.total)} ({memory.source})"
    report["verdict"] = f"{'fits' if enough else 'does not fit'}: {free}"
    print(report["verdict"], flush=True)
    if needed.length < config.max_length:
        limit = f"the model reads {needed.length} tokens"
        print(f"{limit}, fewer than --max-length {config.max_length}")
    if not enough:
        print("hint: --quantization 4bit (with a GPU), --dtype bfloat16, or a smaller model")
    if not enough or not steps:
        return int(not enough)
    print(f"\nloading {config.model} for a trial", file=sys.stderr)
    trial = run_trial(config, task, steps, needed.length)
    report["trial"] = asdict(trial)
    print("", *trial_lines(trial), sep="\n", flush=True)
    return 0 if trial.failure is None else 1


def size(count: float) -> str:
    units = (("GiB", 2**30), ("MiB", 2**20))
    unit, factor = next((pair for pair in units if count >= pair[1]), ("KiB", 2**10))
    return f"{count / factor:,.2f} {unit}"


def estimate_lines(needed: Estimate) -> list[str]:
    share = f"{needed.trainable / needed.model_numbers:.4%} of the model's {needed.model_numbers:,}"
    head = f" and {needed.head:,} of a head" if needed.head else ""
    return [
        "memory estimated from the model's configuration, without activations",
        f"  frozen weights         {size(needed.frozen)}",
        f"  trained weights        {size(needed.trained)}, with gradients and Adam's moments "
        f"{size(4 * needed.trained)}",
        f"  trained parameters     {needed.trainable:,} ({share}){head}",
        f"  total                  {size(needed.total)}",
    ]


def trial_lines(trial: Trial) -> list[str]:
    """Format the trial's measurements, or the reason of its failure."""
    lines = [
        f"trial: {trial.steps} training steps on random text, {trial.length} tokens an example"
    ]
    if trial.outcome is not None:
        alone = f"{trial.frozen_seconds * 1e3:,.1f} ms, forward and backward"
        facts = {"frozen model alone": alone, "ratio": f"{trial.ratio:.3f}"}
        lines += [f"  {name}: {text}" for name, text in (trial.outcome.figures() | facts).items()]
    return [*lines, f"  FAILED: {trial.failure}" if trial.failure else "  passed"]
