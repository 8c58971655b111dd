"""A run's output folder: checks before a run starts or resumes, checkpoints, and the adapter."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

from reft_train.config import Bookkeeping, RunConfig, Scoring, read_yaml
from reft_train.errors import wrong
from reft_train.evaluation.scoring import PREDICTIONS
from reft_train.files import check_folder
from reft_train.methods import check_base
from reft_train.models import model_config
from reft_train.training.arguments import BOARD
from reft_train.training.callbacks import LOG
from reft_train.training.outcome import RESULTS

STAGING, LOSS, _STATE = ".saving", "loss.json", "trainer_state.json"
NEEDED = ("adapter_config.json", "adapter_model.safetensors", "scheduler.pt", LOSS, _STATE)
CONFIG, DATA, ADAPTER = "config.yaml", "data.sha256", "adapter"
# settings that may change when a run is resumed
_FREE = {*Bookkeeping.model_fields, *Scoring.model_fields, "data", "train", "device"}


def check_output(config: RunConfig) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run.

    Raises:
        UserError: neither is possible in the output folder.
    """
    output = Path(config.output)
    check_folder(output, "output")
    if config.resume:
        checkpoint = last(output)
        if checkpoint is None:
            raise wrong("resume", f"{output}, which has no checkpoint", "a run that was started")
        _check_same(config, output)
        return checkpoint
    if not config.overwrite and (checkpoints(output) or (output / RESULTS).exists()):
        expected = "another folder, --resume or --overwrite"
        raise wrong("output", f"{output}, which contains a run", expected)
    return None


def _check_same(config: RunConfig, output: Path) -> None:
    if not (output / CONFIG).is_file():
        raise wrong("resume", f"{output} without {CONFIG}", "a run of reft-train")
    # the number of workers determines how a stream's rows are distributed
    free = _FREE - {"workers"} if config.streaming else _FREE
    for name, value in read_yaml(output / CONFIG).items():
        current = getattr(config, name)
        if name == "model":  # the model may have moved, but must be the same one
            check_base(model_config(config), output, "model")
        elif name not in free and current != value:
            what = f"{name} {current!r}, but the run was started with {value!r}"
            raise wrong("resume", what, "the same")


def clear(output: Path, *, everything: bool) -> None:
    """Remove what a killed run left incomplete, or with ``everything`` the whole previous run."""
    for path in (output / STAGING, *output.glob(".adapter-*")):
        shutil.rmtree(path, ignore_errors=True)
    if not everything:
        return
    folders = (output / name for name in (ADAPTER, PREDICTIONS, BOARD))
    for path in (*checkpoints(output), *folders):
        shutil.rmtree(path, ignore_errors=True)
    for name in (RESULTS, LOG):
        (output / name).unlink(missing_ok=True)


def resume_hint(config: RunConfig) -> str:
    """Return the command that resumes a run."""
    path = str(Path(config.output) / CONFIG)
    return shlex.join(["reft-train", "run", "--config", path, "--resume"])


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
