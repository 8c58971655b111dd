"""``run``: train an adapter from a configuration file or flags, score it, and write a report."""

from __future__ import annotations

import argparse
import os
import sys

from reft_train.errors import ReportedError, UserError
from reft_train.flags import add_settings, settings

DESCRIPTION = """Train a ReFT adapter (or a PEFT baseline) on a frozen Hugging Face model and
score it on the task's test sets. Settings come from the task's recipe, then from --config, then
from flags. Under torchrun or accelerate launch several processes share the work. Ctrl-C saves a
checkpoint and prints the command that resumes the run."""


def add_parser(subparsers) -> None:
    """Add the command and its flags."""
    text = "train and score an adapter on a task"
    command = subparsers.add_parser("run", help=text, description=DESCRIPTION)
    add_settings(command)
    command.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 130 if interrupted; bad input is reported before training."""
    try:
        config = settings(parsed)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise ReportedError(str(error)) from None  # the first process of this machine prints it
    from reft_train.training.processes import leave
    from reft_train.training.run_dir import resume_hint
    from reft_train.training.session import train

    try:
        outcome = train(config)
    except UserError:
        leave()  # all processes raise together; exiting with group threads running would abort
        raise
    leave()
    if int(os.environ.get("RANK", "0")) == 0:
        print(outcome.summary())
        if outcome.interrupted:
            stopped = f"stopped at step {outcome.steps}, checkpoint saved"
            print(f"{stopped}; to resume: {resume_hint(config)}", file=sys.stderr)
    return 130 if outcome.interrupted else 0
