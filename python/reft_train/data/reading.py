"""Files of rows: lookup in folders, and readers.

Readers: .json (a list of objects), .jsonl, .csv, .tsv and .parquet. ``datasets.load_dataset`` is
not used: it gives each column one type, so that an answer column with letters and numbers comes
back JSON-encoded, and it refuses such files with blank lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reft_train.errors import UserError, one_line, wrong
from reft_train.tasks.base import Row, Task

# training sets whose name differs from the task's
_LLM_ADAPTERS = {"commonsense": "commonsense_170k", "math": "math_10k"}
TRAINING_SETS = {**_LLM_ADAPTERS, "instruct": "alpaca_data_cleaned"}


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
    if path.is_dir():
        raise wrong(name, f"{path}, which is a folder", "a file")
    if path.suffix.lower() not in _READERS:
        raise wrong(name, path, f"a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise wrong(name, f"{path}, which does not exist", "a file")
    return path


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


def find(
    task: Task,
    data: Path | None = None,
    train: Path | None = None,
    tests: Sequence[Path] = (),
    *,
    train_needed: bool = True,
    tests_needed: bool = False,
) -> tuple[Path | None, dict[str, Path]]:
    """Find a task's training file and its test files by set.

    Named files take precedence over those in the folder.

    The files of a set are ``<data>/<set>/{train,test}.json`` (for GLUE ``validation`` instead of
    ``test``), or lie directly in ``<data>`` if that is the folder of the set. Mixtures train on a
    file of :data:`TRAINING_SETS`, or on ``train.json`` in a folder of that name, and are tested on
    those of their sets that exist. Any of :data:`SUFFIXES` is accepted, and for Parquet
    also the hub's file name, ``train-00000-of-00001.parquet``.

    Args:
        data, train, tests: command line arguments.
        train_needed, tests_needed: whether to raise if nothing is found. Otherwise the training
            file is None, or there are no test files.
    """
    if data is not None and not Path(data).is_dir():
        kind = "a file (use --train and --test)" if Path(data).exists() else "missing"
        raise wrong("--data", f"{data}, which is {kind}", "a folder")
    train = None if train is None else existing_file(train, "--train")
    named = _named_tests(task, tests)
    if data is None:
        missing = {"--train": train_needed and not train, "--test": tests_needed and not named}
        for flag in (flag for flag, needed in missing.items() if needed):
            raise wrong(flag, f"nothing for task {task.name}", "a file, or a folder with --data")
        return train, named
    short, glue = task.name.removeprefix("glue/"), task.name.startswith("glue/")
    if train is None:
        name = TRAINING_SETS.get(task.name)
        stems = [name, f"{name}/train", "train"] if name else [f"{short}/train", "train"]
        train = _first(data, stems, train_needed)
    if not named:
        places = {
            name: [f"{short}/{name}" if glue else f"{name}/test", name] for name in task.test_sets
        }
        found = {name: _first(data, stems) for name, stems in places.items()}
        if not glue and not any(found.values()):
            only = task.test_sets[0] if len(task.test_sets) == 1 else "test"
            found = {only: _first(data, ["test"])}
        named = {name: path for name, path in found.items() if path}
        if tests_needed and not named:
            _first(data, [stem for stems in places.values() for stem in stems], True)
    return train, named


def _first(data: Path, stems: Sequence[str], needed: bool = False) -> Path | None:
    for stem in stems:
        candidates = [data / f"{stem}{end}" for end in (*SUFFIXES, "-00000-of-00001.parquet")]
        files = [path for path in candidates if path.is_file()]
        if len(files) > 1:
            hint = "one of them (choose with --train and --test)"
            raise wrong("--data", f"both {files[0]} and {files[1]}", hint)
        if files:
            return files[0]
    if needed:
        places = f"one of {', '.join(str(data / stem) for stem in stems)} ({', '.join(SUFFIXES)})"
        raise wrong("--data", "a folder without a file for the task", places)
    return None


def _named_tests(task: Task, tests: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in tests:
        path = existing_file(path, "--test")
        # both boolq/test.json and boolq.json belong to boolq
        in_set = path.stem == "test" and path.parent.name in task.test_sets
        name = path.parent.name if in_set else path.stem
        name = str(path) if name in named else name
        if name in named:
            raise wrong("--test", f"{path} twice", "each file once")
        named[name] = path
    return named
