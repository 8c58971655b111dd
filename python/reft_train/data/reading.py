"""Files of rows: .json (a list of objects), .jsonl, .csv, .tsv and .parquet, with errors that
name the line or row.
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
    """All rows of a file; see :func:`iter_rows`."""
    return list(iter_rows(path, name))


def iter_rows(path: Path, name: str = "--train") -> Iterator[Row]:
    """The rows of a file, one after another; only .json is read whole before the first.

    JSON objects keep their types and Parquet its columns'; .csv and .tsv have a header and give
    strings. In .tsv nothing is quoted, so that a field cannot hold a tab or a newline. Blank lines
    of .jsonl are skipped.

    Args:
        name: the argument that errors name.

    Raises:
        UserError: no such file or an unknown suffix (at once); not UTF-8, malformed, or without a
            row (on the way).
    """
    path = existing_file(path, name)
    return _at_least_one(_READERS[path.suffix.lower()](path, name), path, name)


def existing_file(path: Path, name: str) -> Path:
    """``path``, once it is sure that it is a file of a known suffix.

    Raises:
        UserError: it is not; the message says what the folder holds instead.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{name}: got {path}, which is a folder, expected a file{_nearby(path, '')}"
        )
    if path.suffix.lower() not in _READERS:
        raise UserError(f"{name}: got {path}, expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(
            f"{name}: got {path}, which does not exist, expected a "
            f"file{_nearby(path.parent, path.name)}"
        )
    return path


def _nearby(folder: Path, wanted: str) -> str:
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    files = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _READERS)
    close = difflib.get_close_matches(wanted, files, n=3)
    shown = close or files[:5]
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
        raise UserError(
            f"{name}: got {path}, which cannot be read ({error.strerror or error}), expected a file"
        ) from None
    if row is None:
        raise UserError(f"{name}: got {path} without a row, expected at least one")


def _lines(path: Path, name: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}: got line {number} of {path}, which is not UTF-8 ({error.reason} at "
                    f"byte {error.start + 1}), "
                    "expected UTF-8"
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
        raise UserError(
            f"{name}: got {path}, which is not JSON ({error}), expected a list of objects{lines}"
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
                reason = f"{error.msg}, column {error.colno}"
                raise UserError(
                    f"{name}: got {where}, which is not JSON ({reason}), expected an object"
                ) from None
            yield _object(value, where, name)


def _table(path: Path, name: str, **dialect: Any) -> Iterator[Row]:
    reader = csv.reader(_lines(path, name), strict=True, **dialect)
    try:
        columns = next(reader, [])
        repeated = {column for column in columns if columns.count(column) > 1}
        if repeated:
            raise UserError(
                f"{name}: got {path} with column {sorted(repeated)[0]!r} more than once, expected "
                "each once"
            )
        rows = (values for values in reader if values)  # a blank line is no row
        for number, values in enumerate(rows, start=1):
            where = f"row {number} of {path}"
            if len(values) != len(columns):
                place = f"{where} (line {reader.line_num})"
                raise UserError(
                    f"{name}: got {len(values)} fields in {place}, expected the header's "
                    f"{len(columns)}"
                )
            yield Row(dict(zip(columns, values, strict=True)), where)
    except csv.Error as error:
        raise UserError(
            f"{name}: got {path}, line {reader.line_num}: {error}, expected a table with a header"
        ) from None


def _csv(path: Path, name: str) -> Iterator[Row]:
    return _table(path, name)


def _tsv(path: Path, name: str) -> Iterator[Row]:
    return _table(path, name, delimiter="\t", quoting=csv.QUOTE_NONE)


def _parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{name}: got {path} without pyarrow to read it, expected pip install pyarrow"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"row {number} of {path}")
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: got {path}, which is not Parquet ({reason}), expected a Parquet file"
        ) from None


_READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
