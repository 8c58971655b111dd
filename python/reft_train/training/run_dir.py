"""A run's output folder: contents, checks before a run starts or resumes, and the adapter."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from reft_train.config import Bookkeeping, RunConfig, Scoring, read_yaml
from reft_train.errors import UserError, wrong
from reft_train.evaluation.writing import ALPACA_EVAL, PREDICTIONS
from reft_train.files import check_folder, replace_folder
from reft_train.methods import check_base, save_adapter
from reft_train.models import check_reachable, model_config
from reft_train.training import prepare
from reft_train.training.arguments import BOARD
from reft_train.training.callbacks import LOG
from reft_train.training.checkpoints import checkpoints, last
from reft_train.training.outcome import RESULTS
from reft_train.training.run_report import PAGE, PICTURE
from reft_train.training.sharding import trained_state

if TYPE_CHECKING:
    from reft_train.training.trainer import ReftTrainer

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
            if current == value:
                check_reachable(config, output)
            check_base(model_config(config), output, "model")
        elif name not in free and current != value:
            what = f"{name} {current!r}, but the run was started with {value!r}"
            raise wrong("resume", what, "the same")


def check_same_data(rows: prepare.Rows, output: Path) -> None:
    """Raise UserError if a resumed run has different training rows."""
    path = output / DATA  # missing if the run was killed early
    if path.is_file() and path.read_text(encoding="utf-8") != rows.digest():
        raise UserError(f"resume: the training rows differ from those that {output} started with")


def clear(output: Path) -> None:
    """Remove the files of a previous run."""
    folders = (output / name for name in (ADAPTER, PREDICTIONS, ALPACA_EVAL, BOARD))
    for path in (*checkpoints(output), *folders):
        shutil.rmtree(path, ignore_errors=True)
    for name in (RESULTS, LOG, PICTURE, PAGE):
        (output / name).unlink(missing_ok=True)


def publish_adapter(trainer: ReftTrainer, output: Path) -> None:
    """Write the adapter to a temporary folder and rename it."""
    state = trained_state(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.args.should_save:
        bare = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        with tempfile.TemporaryDirectory(dir=output, prefix=".adapter-") as staged:
            save_adapter(bare, Path(staged) / ADAPTER, state)
            replace_folder(Path(staged) / ADAPTER, output / ADAPTER)
    trainer.accelerator.wait_for_everyone()


def resume_hint(config: RunConfig) -> str:
    """Return the command that resumes a run."""
    path = str(Path(config.output) / CONFIG)
    return shlex.join(["reft-train", "run", "--config", path, "--resume"])
