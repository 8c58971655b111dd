"""Readers of row files: .json (a list of objects), .jsonl, .csv, .tsv and .parquet.

``datasets.load_dataset`` is not used: it gives each column one type, so that an answer column with
letters and numbers comes back JSON-encoded, and it refuses such files with blank lines.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reft_train.errors import UserError, one_line, wrong
from reft_train.tasks.base import Row


def read_rows(path: Path, name: str = "--train") -> list[Row]:
    """Read all rows of a file; see :func:`iter_rows`."""
    return list(iter_rows(path, name))


def iter_rows(path: Path, name: str = "--train") -> Iterator[Row]:
    """Iterate over the rows of a file; only .json is read completely first.

    JSON and Parquet keep their types; .csv and .tsv need a header and give strings. Quotes are not
    special in .tsv. Blank lines of .jsonl are skipped.

    Args:
        name: argument name for error messages.
    """
    path, where = existing_file(path, name), ""
    try:
        for place, fields in _READERS[path.suffix.lower()](path):
            where = f"{place} of {path}"
            if not isinstance(fields, dict):
                raise wrong(name, f"{where}, which is a {type(fields).__name__}", "an object")
            yield Row(fields, where)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        after = f" after {where}" if where else ""
        reason = f"which cannot be read{after} ({one_line(error)})"
        raise wrong(name, f"{path}, {reason}", f"a {path.suffix} file of rows") from None
    if not where:
        raise wrong(name, f"{path} without a row", "at least one")


def existing_file(path: Path, name: str) -> Path:
    """Return ``path`` after checking that it is a file with a supported suffix."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if path.suffix.lower() not in _READERS and not path.is_dir():
        raise wrong(name, path, f"a file that ends in {', '.join(SUFFIXES)}")
    if path.is_file():
        return path
    files = [entry.name for entry in folder.glob("*") if entry.suffix.lower() in _READERS]
    shown = difflib.get_close_matches(path.name, files, n=3) or sorted(files)[:5]
    nearby = f" ({folder} has {', '.join(shown)})" if shown else ""
    what = "which is a folder" if path.is_dir() else "which does not exist"
    raise wrong(name, f"{path}, {what}", f"a file{nearby}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    if not isinstance(rows, list):
        raise ValueError(f"a {type(rows).__name__} instead of a list of objects")
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    text = f"line {number}, column {error.colno}: {error.msg}"
                    raise ValueError(text) from None


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    tabs = path.suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True, **dialect)
        columns = reader.fieldnames or ()
        if len(set(columns)) < len(columns):
            raise ValueError(f"the columns {', '.join(columns)} are not distinct")
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} does not have {len(columns)} fields")
            yield f"row {number}", row


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
