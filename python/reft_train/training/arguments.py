"""Conversion of a run's settings to transformers' TrainingArguments on all supported releases."""

from __future__ import annotations

import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from reft_train.config import RunConfig
from reft_train.errors import wrong
from reft_train.models import pick_device
from reft_train.training.sharding import fsdp_arguments

BOARD = "tensorboard"


def _strategy(every: int | None, name: str) -> dict[str, Any]:
    kind = "epoch" if every is None else "steps"
    return {f"{name}_strategy": kind} | ({} if every is None else {f"{name}_steps": every})


def training_arguments(
    config: RunConfig, output: Path, model: Any, examples: int | None, metric: str | None
) -> Any:
    """Build the TrainingArguments of a run.

    Args:
        model: the PEFT model.
        examples: number of training examples, None for a stream.
        metric: metric that selects the best checkpoint ("loss" or a metric's name). None: no
            selection.
    """
    device, save_every = pick_device(config), config.save_every
    if config.mixed_precision == "fp16" and device == "cpu":
        raise wrong("mixed_precision", "fp16 on a CPU", "bf16 or no")
    if config.deepspeed is not None and find_spec("deepspeed") is None:
        raise wrong("deepspeed", f"{config.deepspeed}, but deepspeed is not installed", "none")
    total = config.max_steps or 0  # of optimizer steps
    if config.max_steps is None and examples is not None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        forwards = math.ceil(math.ceil(examples / config.batch_size) / processes)
        total = config.epochs * max(1, math.ceil(forwards / config.accumulation))
    extra: dict[str, Any] = {}
    if metric is not None:
        if save_every not in (None, config.evaluate_every):
            expected = f"evaluate_every, {config.evaluate_every}: it must have been evaluated"
            raise wrong("save_every", f"{save_every} with select", expected)
        save_every = config.evaluate_every
        extra = {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{metric}"}
        extra["greater_is_better"] = metric != "loss"
    if config.streaming and save_every is None:
        save_every = math.ceil(total / 10)  # a stream has no epochs
    if config.validation > 0 or metric is not None:
        extra |= _strategy(config.evaluate_every, "eval")
    board = find_spec("tensorboard") is not None
    if board:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / BOARD)
    if config.gradient_checkpointing:
        # the argument was renamed in transformers 5.23
        new = "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        extra |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    constant = config.schedule == "constant"
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(config.warmup * total),
        lr_scheduler_type="constant_with_warmup" if constant else config.schedule,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.mixed_precision == "bf16",
        fp16=config.mixed_precision == "fp16",
        use_cpu=device == "cpu",
        torch_compile=config.compile,
        deepspeed=config.deepspeed,
        ddp_find_unused_parameters=False,
        logging_steps=config.log_every,
        logging_first_step=True,
        disable_tqdm=not sys.stderr.isatty(),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_num_workers=config.workers,
        # batches differ in width, so one batch cannot be split among processes
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=device == "cuda",
        report_to=["tensorboard"] if board else [],
        save_total_limit=None,
        **_strategy(save_every, "save"),
        **extra,
        **fsdp_arguments(config, model),
    )
    if arguments.device.type == "cpu" and arguments.device.index is not None:
        # transformers 4 uses indexed CPU devices, and an optimizer cannot be loaded to "cpu:0"
        vars(arguments)["_setup_devices"] = torch.device("cpu")
    return arguments
