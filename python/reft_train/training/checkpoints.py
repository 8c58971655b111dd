"""Checkpoints of a run: written aside, put in place in one step, found again, and thinned out."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from reft_train.errors import UserError

_NAME = re.compile(r"checkpoint-(\d+)")
STAGING = ".saving"
LOSS = "loss.json"
_STATE = "trainer_state.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "scheduler.pt", LOSS, _STATE)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staged: Path, target: Path) -> None:
    """Make the folder ``staged`` the checkpoint ``target``: on the disk first, then under its name.

    A step that is saved twice, before and after an evaluation, keeps its folder: the files go over
    the old ones one by one, and since both are of the same step, any mixture of them is whole.
    """
    files = sorted(
        (path for path in staged.rglob("*") if path.is_file()), key=lambda path: path.name == _STATE
    )
    for path in files:
        _sync(path)
    _sync(staged)
    if target.exists():
        for path in files:
            place = target / path.relative_to(staged)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
        _sync(target)
    else:
        os.replace(staged, target)
    _sync(target.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in (folder / STAGING, *folder.glob(".adapter-*")):
        shutil.rmtree(path, ignore_errors=True)


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder; -1 for another folder."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match and path.is_dir() else -1


def checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [path for path in folder.iterdir() if step_of(path) >= 0] if folder.is_dir() else []
    return sorted(found, key=step_of)


def last(folder: Path) -> Path | None:
    """A run's newest checkpoint; None where there is none.

    Raises:
        UserError: it lacks a file, so this program did not write it.
    """
    found = checkpoints(folder)
    if not found:
        return None
    missing = [name for name in NEEDED if not (found[-1] / name).is_file()]
    if missing:
        raise UserError(
            f"resume: got {found[-1]} without {', '.join(missing)}, expected a whole checkpoint"
        )
    return found[-1]


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Remove all but the ``keep`` newest checkpoints, and never the best one."""
    for path in checkpoints(folder)[:-keep]:
        if best is None or path != Path(best):
            shutil.rmtree(path)
