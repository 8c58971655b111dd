"""Reader of a run's log, which has one JSON object per line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from reft_train.errors import UserError

LOG = "log.jsonl"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read a log. An incomplete last line of a killed run is skipped with a warning."""
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
        except (ValueError, TypeError) as error:  # JSON and UTF-8 decoding errors are ValueErrors
            if number != lines[-1][0] or content.endswith(b"\n"):
                where = f"line {number} of {path}"
                raise UserError(f"log: got {where} ({error}), expected a JSON object") from None
            warnings.warn(f"{path}: line {number} was cut short and is left out", stacklevel=2)
    return entries
