"""``doctor``: what is installed, whether a model fits this machine, and a trial of a few steps.

Here are the command's flags and the order of its checks; the modules beside it do the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train import arguments
from reft_train.errors import UserError
from reft_train.flags import add_settings, given, settings

if TYPE_CHECKING:
    from reft_train.config import RunConfig
    from reft_train.tasks.base import Task

DESCRIPTION = """Say what is installed and which backend serves which operator. With --model and --task, estimate the memory
that a training needs before any weight is loaded, compare it with the machine's, and train a few steps on random tokens. Exits
with 1 when the memory does not suffice or the trial fails."""


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    summary = "check the installation, the memory that a model needs, and a few training steps"
    command = subparsers.add_parser("doctor", help=summary, description=DESCRIPTION)
    command.add_argument(
        "--trial-steps",
        type=arguments.count(0),
        default=10,
        metavar="N",
        help="timed steps; 0: no trial (default: 10)",
    )
    command.add_argument("--json", metavar="FILE", help="write everything to a file too")
    add_settings(command)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """The command.

    Returns:
        0; 1 when the memory does not suffice or the trial failed.

    Raises:
        UserError: bad input, found before the trial starts.
    """
    if parsed.json is not None and Path(parsed.json).is_dir():
        raise UserError(f"--json: got {parsed.json}, which is a folder, expected a file")
    config = _config(parsed)
    from reft_train.doctor.environment import environment, environment_lines

    found: dict[str, Any] = {"environment": environment()}
    _say(environment_lines(found["environment"]))
    code = 0 if config is None else _examine(config, parsed.trial_steps, found)
    if parsed.json is not None:
        from reft_train.files import write_text
        from reft_train.reporting.strict_json import dumps

        print(f"written: {write_text(Path(parsed.json), dumps(found))}")
    return code


def _config(parsed: argparse.Namespace) -> RunConfig | None:
    if parsed.config is None and "model" not in parsed:
        stray = [name for name in given(parsed) if name != "task"]
        if stray or "task" in parsed:
            name = (stray or ["task"])[0].replace("_", "-")
            raise UserError(
                f"--model: got none with --{name}, expected a model's folder or hub name"
            )
        return None
    return settings(parsed)


def _say(lines: list[str]) -> None:
    print("\n".join(["", *lines]), flush=True)


def _examine(config: RunConfig, steps: int, found: dict[str, Any]) -> int:
    from dataclasses import asdict

    from reft_train import models, tasks
    from reft_train.doctor.estimate import estimate, length_of, remedies
    from reft_train.doctor.machine import memory_of
    from reft_train.doctor.skeleton import build
    from reft_train.doctor.text import estimate_lines, remedy_lines, verdict

    task = tasks.get(config.task)
    device = models.pick_device(config)
    skeleton = build(config, task)
    needed, length = estimate(config, task, skeleton), length_of(config, skeleton)
    memory = memory_of(device, spread=config.device_map == "auto")
    found["settings"] = config.to_dict()
    found["estimate"] = {**asdict(needed), "total": needed.total, "length": length}
    found["memory"] = None if memory is None else {"device": device, **asdict(memory)}
    found["verdict"] = verdict(needed, memory, device)
    _say([*estimate_lines(needed, config.batch_size, length), found["verdict"]])
    if length < config.max_length:
        print(f"the model reads {length} tokens, fewer than --max-length {config.max_length}")
    if memory is not None and needed.total > memory.free:
        hints = list(remedies(config, task, skeleton, memory.free, device == "cuda"))
        found["remedies"] = {flags: other.total for flags, other in hints}
        print("\n".join(remedy_lines(hints, memory)))
        if steps:
            print("no trial, since it would run out of memory")
        return 1
    return _try(config, task, steps, length, needed, found) if steps else 0


def _try(
    config: RunConfig, task: Task, steps: int, length: int, needed: Any, found: dict[str, Any]
) -> int:
    from dataclasses import asdict

    from reft_train.doctor.text import trial_lines
    from reft_train.doctor.trial import run_trial

    print(f"\nloading {config.model} for a trial", file=sys.stderr)
    trial = run_trial(config, task, steps, length)
    found["trial"] = asdict(trial)
    _say(trial_lines(trial, needed))
    return 0 if trial.failure is None else 1
