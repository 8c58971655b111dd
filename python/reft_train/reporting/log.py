"""Read a run's log: one JSON object a line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from reft_train.errors import UserError

LOG = "log.jsonl"


def _parsed(line: bytes) -> dict[str, Any]:
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log, in order.

    A run that was killed may leave half a last line: it is left out, with a warning. Empty lines
    are skipped.

    Raises:
        UserError: the file cannot be read, or a line that another one follows is no JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"log: got {path}, which cannot be read ({error.strerror}), expected a run's {LOG}"
        ) from None
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    entries = []
    for number, line in lines:
        try:
            entries.append(_parsed(line))
        except ValueError as error:  # JSON's and UTF-8's errors are ValueErrors
            if number != lines[-1][0] or content.endswith(b"\n"):
                raise UserError(
                    f"log: got line {number} of {path} ({error}), expected a JSON object"
                ) from None
            warnings.warn(
                f"{path}: line {number} was cut short, probably by a killed run; it is left out",
                stacklevel=2,
            )
    return entries
