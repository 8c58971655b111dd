"""Command line entry point: ``python -m reft_train COMMAND``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence

from reft_train import commands
from reft_train.errors import ReportedError, UserError


def parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m reft_train", description="Train and evaluate ReFT adapters."
    )
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parsers(subparsers)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: a check or a training failed. 2: bad input. 130: interrupted.
    """
    # under torchrun only the first process of a machine prints argument errors
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        parsed = parser().parse_args(arguments)

    def report(text: object, code: int = 2) -> int:
        if first or code == 2:
            print(f"reft_train {parsed.command}: {text}", file=sys.stderr)
        return code

    try:
        return parsed.execute(parsed)
    except ReportedError:
        return 2
    except UserError as error:
        # an error from a data loader worker carries a full traceback; its last part is the message
        return report(f"error: {str(error).strip().rpartition('UserError: ')[2]}")
    except FloatingPointError as error:
        return report(error, 1)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("reft_"):
            raise
        hint = 'pip install "reft_kernels[train]" installs what reft-train needs'
        return report(f"error: the module {error.name} is not installed; {hint}")
    except OSError as error:  # disk full or permission denied; a traceback would not help
        return report(f"error: {error}")
    except KeyboardInterrupt:
        report("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
