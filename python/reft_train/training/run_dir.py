"""A run's output folder: contents, checks before a run starts or resumes, and the adapter."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reft_train.config import RunConfig, read_yaml
from reft_train.errors import UserError
from reft_train.evaluation.writing import ALPACA_EVAL, PREDICTIONS
from reft_train.files import check_folder, replace_folder
from reft_train.methods import check_run_base, save_adapter
from reft_train.models import check_reachable, model_config
from reft_train.reporting.log import LOG
from reft_train.training import prepare
from reft_train.training.arguments import BOARD
from reft_train.training.checkpoints import checkpoints, last
from reft_train.training.outcome import RESULTS
from reft_train.training.run_report import PAGE, PICTURE
from reft_train.training.sharding import trained_state

if TYPE_CHECKING:
    from reft_train.training.trainer import ReftTrainer

CONFIG, DATA, ADAPTER = "config.yaml", "data.sha256", "adapter"
# settings that may change when a run is resumed
_FREE = {
    "resume",
    "overwrite",
    "output",
    "threads",
    "workers",
    "cache",
    "log_every",
    "keep",
    "skip_test",
    "test",
    "test_rows",
    "eval_batch_size",
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_beams",
    "data",
    "train",
    "device",
}


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
            raise UserError(
                f"resume: got {output}, which holds no checkpoint, expected a run that was begun"
            )
        _check_same(config, output)
        return checkpoint
    if not config.overwrite and (checkpoints(output) or (output / RESULTS).exists()):
        raise UserError(
            f"output: got {output}, which holds a run, expected another folder, --resume or "
            "--overwrite"
        )
    return None


def _check_same(config: RunConfig, output: Path) -> None:
    path = output / CONFIG
    if not path.is_file():
        raise UserError(f"resume: got {output} without {CONFIG}, expected a run of reft-train")
    for name, value in read_yaml(path).items():
        current = getattr(config, name)
        # these settings determine how a stream's rows are distributed
        free = name in _FREE and not (name == "workers" and config.streaming)
        if name == "model":  # the model may have moved, but must be the same one
            if current == value:
                check_reachable(config, output)
            check_run_base(config, output, model_config(config))
        elif not free and current != value:
            raise UserError(
                f"resume: got {name} {current!r}, but the run was begun with {value!r}, "
                "expected the same"
            )


def check_same_data(rows: prepare.Rows, output: Path) -> None:
    """Raise UserError if a resumed run has different training rows."""
    try:
        begun = (output / DATA).read_text(encoding="utf-8")
    except OSError:
        return  # missing if the run was killed early or the file was removed; nothing to compare
    if begun != prepare.digest(rows):
        raise UserError(
            f"resume: got other training rows than {output} was begun with, expected the same"
        )


def check_room(model: torch.nn.Module, config: RunConfig) -> None:
    """Raise UserError if the disk cannot hold the checkpoints.

    Counts the parameters and two optimizer moments for one checkpoint more than are kept.
    """
    output = Path(config.output)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = (config.keep + 2) * (3 * trained + 2**20)
    free = shutil.disk_usage(check_folder(output, "output")).free
    if free < needed:
        expected = f"at least {needed / 2**20:.0f} MiB for checkpoints"
        raise UserError(
            f"output: got {output} with {free / 2**20:.0f} MiB free, expected {expected}"
        )


def clear(output: Path) -> None:
    """Remove the files of a previous run."""
    for path in (
        *checkpoints(output),
        *(output / name for name in (ADAPTER, PREDICTIONS, ALPACA_EVAL, BOARD)),
    ):
        shutil.rmtree(path, ignore_errors=True)
    for name in (RESULTS, LOG, PICTURE, PAGE):
        (output / name).unlink(missing_ok=True)


def publish_adapter(trainer: ReftTrainer, output: Path) -> None:
    """Write the adapter to a temporary folder and rename it."""
    state = trained_state(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.args.should_save:
        staged = Path(tempfile.mkdtemp(dir=output, prefix=".adapter-"))
        try:
            bare = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
            save_adapter(bare, staged / ADAPTER, state)
            replace_folder(staged / ADAPTER, output / ADAPTER)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def resume_hint(config: RunConfig) -> str:
    """Return the command that resumes a run."""
    return shlex.join(
        ["reft-train", "run", "--config", str(Path(config.output) / CONFIG), "--resume"]
    )
