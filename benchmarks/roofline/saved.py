"""The committed table of ESTIMATES, which the page of results shows in a section of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NAME = "estimates.json"


@dataclass(frozen=True)
class Saved:
    """A table of estimates.

    Attributes:
        title: Width, rank and dtype.
        commit: Commit of the kernels.
        head: Titles of the columns.
        rows: Cells.
        note: What the columns mean.
        assumptions: What the estimates assume.
    """

    title: str
    commit: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    assumptions: Sequence[str]


def write(saved: Saved, folder: Path) -> Path:
    """Write a table into the folder of the results and return its path."""
    path = folder / NAME
    path.write_text(json.dumps(asdict(saved), indent=1) + "\n", encoding="utf-8")
    return path


def read(folder: Path) -> Saved | None:
    """Return the table in the folder of the results, or None if there is none.

    Raises:
        ValueError: If the file is not such a table.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return Saved(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a table that --save has written: {error}") from None
