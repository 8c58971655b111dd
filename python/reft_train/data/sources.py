"""Lookup of a task's training and test files: named files, a folder, or GLUE from the hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from reft_train.data.reading import SUFFIXES, existing_file
from reft_train.errors import UserError
from reft_train.tasks.base import Row, Task

if TYPE_CHECKING:
    from reft_train.tasks.glue import Glue

# training sets whose name differs from the task's
TRAINING_SETS = {
    "commonsense": "commonsense_170k",
    "math": "math_10k",
    "instruct": "alpaca_data_cleaned",
}
GLUE_ON_THE_HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Files:
    """Files of a task. ``train`` is None and ``tests`` empty if not found and not required."""

    train: Path | None
    tests: dict[str, Path] = field(default_factory=dict)


def find(
    task: Task,
    data: Path | None = None,
    train: Path | None = None,
    tests: Sequence[Path] = (),
    *,
    train_needed: bool = True,
    tests_needed: bool = False,
) -> Files:
    """Find the files of a task. Named files take precedence over those in the folder.

    The files of a set are ``<data>/<set>/{train,test}.json`` (for GLUE ``validation`` instead of
    ``test``), or lie directly in ``<data>`` if that is the folder of the set. Mixtures train on a
    file of :data:`TRAINING_SETS`, or on ``train.json`` in a folder of that name, and are tested on
    those of their sets that exist. Any of :data:`reading.SUFFIXES` is accepted, and for Parquet
    also the hub's file name, ``train-00000-of-00001.parquet``.

    Args:
        data, train, tests: command line arguments.
        train_needed, tests_needed: whether to raise if nothing is found.
    """
    if data is not None and not Path(data).is_dir():
        kind = "a file (--train and --test name files)" if Path(data).exists() else "not there"
        raise UserError(f"--data: got {data}, which is {kind}, expected a folder")
    named = _named_tests(task, tests)
    if train is not None:
        train = existing_file(train, "--train")
    elif data is not None:
        name = TRAINING_SETS.get(task.name)
        places = (
            [Path(data, name), Path(data, name, "train")]
            if name
            else [Path(data, _short(task), "train")]
        )
        train = _first([*places, Path(data, "train")], train_needed)
    elif train_needed:
        raise UserError(
            f"--train: got nothing for task {task.name}, expected a file, or a folder with --data"
        )
    if data is not None and not named:
        named = _folder_tests(task, Path(data), tests_needed)
    if tests_needed and not named:
        raise UserError(
            f"--test: got nothing for task {task.name}, expected a file, or a folder with --data"
        )
    return Files(train, named)


def _short(task: Task) -> str:
    return task.name.removeprefix("glue/")


def _folder_tests(task: Task, data: Path, needed: bool) -> dict[str, Path]:
    if task.name.startswith("glue/"):
        (split,) = task.test_sets
        places = {split: [data / _short(task) / split, data / split]}
    else:
        places = {name: [data / name / "test", data / name] for name in task.test_sets}
        if len(places) == 1:
            places[task.test_sets[0]].append(data / "test")
    tests = {name: path for name, stems in places.items() if (path := _first(stems, needed=False))}
    if not tests and len(task.test_sets) > 1 and (path := _first([data / "test"], needed=False)):
        tests = {"test": path}
    if needed and not tests:
        raise _not_found([stem for stems in places.values() for stem in stems])
    return tests


def _first(stems: Sequence[Path], needed: bool) -> Path | None:
    for stem in stems:
        suffixes = (*SUFFIXES, "-00000-of-00001.parquet")
        files = [
            path for suffix in suffixes if (path := stem.with_name(stem.name + suffix)).is_file()
        ]
        if len(files) > 1:
            hint = "expected one of them (--train and --test name files)"
            raise UserError(f"--data: got both {files[0]} and {files[1]}, {hint}")
        if files:
            return files[0]
    if needed:
        raise _not_found(stems)
    return None


def _not_found(stems: Iterable[Path]) -> UserError:
    places = f"{', '.join(map(str, stems))} ({', '.join(SUFFIXES)})"
    return UserError(f"--data: got a folder without a file for the task, expected one of {places}")


def _named_tests(task: Task, tests: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in tests:
        path = existing_file(path, "--test")
        # both boolq/test.json and boolq.json belong to boolq
        name = (
            path.parent.name
            if path.stem == "test" and path.parent.name in task.test_sets
            else path.stem
        )
        name = str(path) if name in named else name
        if name in named:
            raise UserError(f"--test: got {path} twice, expected each file once")
        named[name] = path
    return named


def hub_rows(task: Glue, split: str) -> list[Row]:
    """Load the rows of a GLUE split from the Hugging Face hub or its cache."""
    from datasets import load_dataset

    try:
        rows = load_dataset(GLUE_ON_THE_HUB, task.subset, split=split)
    except Exception as error:  # the hub clients raise errors from many packages
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        files = f"{task.subset}/train.parquet and {task.subset}/{task.test_sets[0]}.parquet"
        others = ", ".join(suffix for suffix in SUFFIXES if suffix != ".parquet")
        raise UserError(
            f"--data: got none, and {GLUE_ON_THE_HUB} {task.subset} does not load from the hub, "
            "as without a "
            f"network ({reason}), expected a folder with {files} (or {others})"
        ) from None
    place = f"{GLUE_ON_THE_HUB} {task.subset} {split}"
    return [Row(dict(row), f"row {number} of {place}") for number, row in enumerate(rows, start=1)]
