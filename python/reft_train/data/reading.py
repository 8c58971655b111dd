"""Readers of row files: .json (a list of objects), .jsonl, .csv, .tsv and .parquet.

``datasets`` is not used: its errors do not name the line, and it forces one type per column.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reft_train.errors import UserError
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
    path = existing_file(path, name)
    return _at_least_one(_READERS[path.suffix.lower()](path, name), path, name)


def existing_file(path: Path, name: str) -> Path:
    """Return ``path`` after checking that it is a file with a supported suffix."""
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{name}: got {path}, which is a folder, expected a file{_nearby(path, '')}"
        )
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{name}: got {path}, expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        nearby = _nearby(path.parent, path.name)
        raise UserError(f"{name}: got {path}, which does not exist, expected a file{nearby}")
    return path


def _nearby(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _READERS)
    shown = difflib.get_close_matches(name, files, n=3) or files[:5]
    return (
        f" ({folder} holds {', '.join(shown)}{', ...' if len(files) > len(shown) else ''})"
        if shown
        else ""
    )


def _at_least_one(rows: Iterator[Row], path: Path, name: str) -> Iterator[Row]:
    row = None
    try:
        for row in rows:
            yield row
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{name}: got {path}, which cannot be read ({reason}), expected a file"
        ) from None
    if row is None:
        raise UserError(f"{name}: got {path} without a row, expected at least one")


def _lines(path: Path, name: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                reason = f"which is not UTF-8 ({error.reason} at byte {error.start + 1})"
                raise UserError(
                    f"{name}: got line {number} of {path}, {reason}, expected UTF-8"
                ) from None


def _object(value: Any, where: str, name: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(
            f"{name}: got {where}, which is a {type(value).__name__}, expected an object"
        )
    return Row(value, where)


def _json(path: Path, name: str) -> Iterator[Row]:
    content = "".join(_lines(path, name))
    if not content.strip():
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        lines = " (one object on each line is .jsonl)" if error.msg == "Extra data" else ""
        reason = f"which is not JSON ({error})"
        raise UserError(
            f"{name}: got {path}, {reason}, expected a list of objects{lines}"
        ) from None
    if not isinstance(rows, list):
        raise UserError(
            f"{name}: got {path}, which is a {type(rows).__name__}, expected a list of objects"
        )
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"row {number} of {path}", name)


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, name), start=1):
        if line.strip():
            where = f"line {number} of {path}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                reason = f"which is not JSON ({error.msg}, column {error.colno})"
                raise UserError(f"{name}: got {where}, {reason}, expected an object") from None
            yield _object(value, where, name)


def _table(path: Path, name: str) -> Iterator[Row]:
    tabs = path.suffix.lower() == ".tsv"
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(_lines(path, name), strict=True, **dialect)
    try:
        columns = next(reader, [])
        repeated = sorted({column for column in columns if columns.count(column) > 1})
        if repeated:
            raise UserError(
                f"{name}: got {path} with column {repeated[0]!r} more than once, expected each once"
            )
        # skips blank lines
        for number, values in enumerate((values for values in reader if values), start=1):
            where = f"row {number} of {path}"
            if len(values) != len(columns):
                place = f"{where} (line {reader.line_num})"
                raise UserError(
                    f"{name}: got {len(values)} fields in {place}, expected the header's "
                    f"{len(columns)}"
                )
            yield Row(dict(zip(columns, values, strict=True)), where)
    except csv.Error as error:
        place = f"{path}, line {reader.line_num}"
        raise UserError(f"{name}: got {place}: {error}, expected a table with a header") from None


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for fields in (row for batch in file.iter_batches() for row in batch.to_pylist()):
                number += 1
                yield Row(fields, f"row {number} of {path}")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: got {path}, which is not Parquet ({reason}), expected a Parquet file"
        ) from None


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _table, ".tsv": _table, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
