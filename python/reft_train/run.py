"""``run``: train an adapter from a configuration file or flags, score it, and write a report."""

from __future__ import annotations

import argparse
import os
import sys

from reft_train.errors import ReportedError, UserError
from reft_train.flags import settings


def run(parsed: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 130 if interrupted; bad input is reported before training."""
    try:
        config = settings(parsed)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        raise ReportedError(str(error)) from None  # the first process of this machine prints it
    from reft_train.ranks import leave
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
