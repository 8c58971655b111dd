"""Checkpoints of a run: atomic writing, lookup, cleanup and rotation."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from reft_train.errors import wrong

STAGING, LOSS, _STATE = ".saving", "loss.json", "trainer_state.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "scheduler.pt", LOSS, _STATE)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(staged: Path, target: Path) -> None:
    """Flush the folder ``staged`` to disk and rename it to the checkpoint ``target``.

    When a step is saved twice (before and after an evaluation), the existing folder is kept and its
    files are replaced one by one. Both versions belong to the same step, so a mixture is valid.
    """
    files = [path for path in staged.rglob("*") if path.is_file()]
    files.sort(key=lambda path: path.name == _STATE)
    for path in (*files, staged):
        _sync(path)
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
    """Remove incomplete checkpoints left by a killed run."""
    for path in (folder / STAGING, *folder.glob(".adapter-*")):
        shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    found = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def last(folder: Path) -> Path | None:
    """Return a run's newest checkpoint, or None."""
    newest = next(reversed(checkpoints(folder)), None)
    missing = [name for name in NEEDED if newest and not (newest / name).is_file()]
    if missing:
        raise wrong("resume", f"{newest} without {', '.join(missing)}", "a complete checkpoint")
    return newest


def rotate(folder: Path, keep: int, best: str | None) -> None:
    """Remove all but the ``keep`` newest checkpoints; the best one is always kept."""
    for path in checkpoints(folder)[:-keep]:
        if best is None or path != Path(best):
            shutil.rmtree(path)
