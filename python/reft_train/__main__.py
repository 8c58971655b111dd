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

from reft_train import run
from reft_train.compare import command as compare
from reft_train.demo import command as demo
from reft_train.doctor import command as doctor
from reft_train.errors import ReportedError, UserError
from reft_train.evaluation import command as evaluation
from reft_train.search import command as search

# what an installation without the extra ``train`` may lack, by the name it is imported by
_TRAIN = (
    "accelerate",
    "datasets",
    "matplotlib",
    "optuna",
    "peft",
    "safetensors",
    "scipy",
    "tqdm",
    "transformers",
)
_EXTRAS = {name: name for name in _TRAIN} | {"sklearn": "scikit-learn", "yaml": "pyyaml"}
COMMANDS = (run, evaluation, search, compare, doctor, demo)


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
    """Run a command; 0 when all is well, 1 when a check or a training failed, 2 for bad input,
    130 when interrupted.
    """
    # started several times by torchrun or accelerate launch, one process of a machine says what all
    # of them see
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.nullcontext() if speaks else contextlib.redirect_stderr(io.StringIO()):
        parsed = parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except ReportedError:
        return 2
    except UserError as error:
        print(f"reft_train {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        if speaks:
            print(f"reft_train {parsed.command}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = _EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(
            f"reft_train {parsed.command}: error: needs the package {package}, which is not "
            "installed; "
            'pip install "reft_kernels[train]" brings it',
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # no space left, no permission: nothing that a traceback would explain
        print(f"reft_train {parsed.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"reft_train {parsed.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
