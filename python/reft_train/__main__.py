"""The command line: ``python -m reft_train COMMAND``. A command is a module that ``COMMANDS``
names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from reft_train import evaluate, run
from reft_train.compare import command as compare
from reft_train.demo import command as demo
from reft_train.doctor import command as doctor
from reft_train.errors import ReportedError, UserError
from reft_train.search import command as search

# what an installation without the extra ``train`` may lack, by the name it is imported by
_TRAIN = (
    "accelerate",
    "datasets",
    "matplotlib",
    "optuna",
    "peft",
    "rich",
    "safetensors",
    "scipy",
    "tqdm",
    "transformers",
)
_EXTRAS = {name: name for name in _TRAIN} | {"sklearn": "scikit-learn", "yaml": "pyyaml"}
COMMANDS = (run, evaluate, search, compare, doctor, demo)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. A command's parser sets ``run``: parsed arguments in, exit
    code out.
    """
    top = argparse.ArgumentParser(
        prog="python -m reft_train", description="Train and evaluate ReFT adapters."
    )
    subparsers = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    for command in COMMANDS:
        command.add_parser(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command: 0, or 1 when a check or a training failed, 2 for bad input, 130 when
    interrupted.
    """
    # of several processes of a machine, started by torchrun, one prints what all of them see
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        parsed = parser().parse_args(arguments)

    def report(text: object) -> int:
        print(f"reft_train {parsed.command}: {text}", file=sys.stderr)
        return 2

    try:
        return parsed.run(parsed)
    except ReportedError:
        return 2
    except UserError as error:
        # of a data loader's worker torch gives the whole traceback, which ends in the message
        return report(f"error: {str(error).strip().rpartition('UserError: ')[2]}")
    except FloatingPointError as error:
        if first:
            report(error)
        return 1
    except ModuleNotFoundError as error:
        package = _EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        hint = 'pip install "reft_kernels[train]" brings it'
        return report(f"error: needs the package {package}, which is not installed; {hint}")
    except OSError as error:  # no space left, no permission: nothing that a traceback would explain
        return report(f"error: {error}")
    except KeyboardInterrupt:
        report("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
