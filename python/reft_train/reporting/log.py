"""Read a run's log: one JSON object a line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from reft_train.errors import UserError

LOG = "log.jsonl"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a log; half a last line, of a run that was killed, is left out with a
    warning.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror
        raise UserError(
            f"log: got {path}, which cannot be read ({reason}), expected a {LOG}"
        ) from None
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    entries: list[dict[str, Any]] = []
    for number, line in lines:
        try:
            entries.append({**json.loads(line.decode("utf-8"))})
        except (ValueError, TypeError) as error:  # JSON's and UTF-8's errors are ValueErrors
            if number != lines[-1][0] or content.endswith(b"\n"):
                where = f"line {number} of {path}"
                raise UserError(f"log: got {where} ({error}), expected a JSON object") from None
            warnings.warn(f"{path}: line {number} was cut short and is left out", stacklevel=2)
    return entries
