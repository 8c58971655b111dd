"""A few real training steps on random tokens: time, memory, and whether the numbers stay finite
and R orthonormal.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from reft_train import methods, models
from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.memory import Peak, PeakMeter
from reft_train.tasks.base import Task
from reft_train.training.session import quiet
from reft_train.training.trainer import orthonormality

MEMORY_STEPS = 2  # Adam's moments exist from the second step on
_LEFT_OUT = ("compile", "fsdp", "deepspeed", "packing")


@dataclass(frozen=True)
class Trial:
    """What the steps gave; ``failure`` says in a line why they stopped, None when all is well.

    Attributes:
        steps: timed training steps. length: tokens of an example. step_seconds, frozen_seconds:
            medians; the frozen model's
            is of its own forward and backward on the same batch. ratio: median over steps of one
                over the other.
        peak: of the first steps, with the weights there already. losses: of all training steps.
        orthonormality: max |R R^T - I| after the last one; None where there is no R. left_out:
        settings that a trial ignores.
    """

    steps: int
    length: int
    step_seconds: float | None = None
    frozen_seconds: float | None = None
    ratio: float | None = None
    tokens_per_second: float | None = None
    peak: Peak | None = None
    losses: tuple[float, ...] = ()
    orthonormality: float | None = None
    left_out: tuple[str, ...] = ()
    failure: str | None = None


def _autocast(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager:
    if config.mixed_precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(
        device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]
    )


def random_batch(
    config: RunConfig, kind: str, model_config: Any, length: int, generator: torch.Generator
) -> dict[str, Any]:
    """Random tokens without padding; a causal model learns the second half of them, an encoder a
    random class.
    """
    size, vocabulary = (config.batch_size, length), model_config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, size, generator=generator)
    if kind == models.CAUSAL:
        labels = tokens.clone()
        labels[:, : length // 2] = -100
    elif kind == models.SEQ2SEQ:
        labels = torch.randint(vocabulary, size, generator=generator)
    elif model_config.num_labels == 1:
        labels = torch.rand(config.batch_size, generator=generator)
    else:
        labels = torch.randint(model_config.num_labels, size[:1], generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class _Steps:
    """The model with its optimizer: a training step, and the frozen model's own forward and
    backward.
    """

    def __init__(self, config: RunConfig, task: Task, device: torch.device) -> None:
        loaded = models.load(config, task)
        if config.device_map == "none" and config.quantization == "none":
            loaded.model.to(device)
        self.config, self.device, self.kind = config, device, loaded.kind
        self.model = methods.adapt(config, loaded)
        if config.device_map == "none":
            self.model.to(device)
        loaded.model.config.use_cache = False  # as Trainer has it
        if config.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", FutureWarning
                )  # the new name is not there in transformers 4
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.lr, weight_decay=config.weight_decay
        )
        self._wants_gradient = False
        embeddings = self.model.get_base_model().get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: self._leaf(output))

    def _leaf(self, output: torch.Tensor) -> torch.Tensor | None:
        # a gradient of the input makes the backward pass every frozen layer
        return output.detach().requires_grad_() if self._wants_gradient else None

    def train(self, batch: dict[str, Any]) -> float:
        """One optimizer step; its loss."""
        with _autocast(self.config, self.device):
            loss = self.model(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def frozen(self, batch: dict[str, Any]) -> None:
        """Forward and backward with the method switched off."""
        wanted = [p for p in self.trained if p.requires_grad]
        self._wants_gradient = True
        try:
            with self.model.disable_adapter():
                for parameter in wanted:
                    parameter.requires_grad_(False)
                with _autocast(self.config, self.device):
                    loss = self.model(**batch).loss
                loss.backward()
        finally:
            self._wants_gradient = False
            for parameter in wanted:
                parameter.requires_grad_(True)


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def run_trial(config: RunConfig, task: Task, steps: int, length: int) -> Trial:
    """Load, adapt and train for :data:`MEMORY_STEPS` steps under the memory meter and ``steps``
    timed ones.

    Each timed step has the frozen model's forward and backward on the same batch beside it, first
    or second by turns.

    Raises:
        UserError: a model that cannot be loaded, or settings that it does not take.
    """
    quiet()
    left_out = tuple(name for name in _LEFT_OUT if getattr(config, name))
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        return _measured(config, task, steps, length, left_out)
    except UserError:  # bad input, not a failed step
        raise
    except (
        RuntimeError,
        ValueError,
        TypeError,
        NotImplementedError,
        torch.OutOfMemoryError,
    ) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Trial(steps, length, left_out=left_out, failure=reason)
    finally:
        torch.set_num_threads(threads)


def _measured(
    config: RunConfig, task: Task, steps: int, length: int, left_out: tuple[str, ...]
) -> Trial:
    device = torch.device(models.pick_device(config))
    stepper = _Steps(config, task, device)
    generator = torch.Generator().manual_seed(config.seed)
    base_config = stepper.model.get_base_model().config

    def batch() -> dict[str, Any]:
        made = random_batch(config, stepper.kind, base_config, length, generator)
        return {name: value.to(device) for name, value in made.items()}

    short = random_batch(
        replace(config, batch_size=1), stepper.kind, base_config, min(length, 16), generator
    )
    # libraries take memory of their own at first use
    stepper.frozen({name: value.to(device) for name, value in short.items()})
    meter = PeakMeter(device)
    meter.start()
    losses = [stepper.train(batch()) for _ in range(MEMORY_STEPS)]
    peak = meter.stop()
    stepper.frozen(batch())  # its kernels and its memory are there before it is timed
    own, frozen = [], []
    for number in range(steps):
        tokens = batch()
        for name in ("train", "frozen") if number % 2 else ("frozen", "train"):
            seconds, loss = _seconds(lambda name=name: getattr(stepper, name)(tokens), device)  # noqa: B023  (called at once)
            if name == "train":
                own.append(seconds)
                losses.append(loss)
            else:
                frozen.append(seconds)
    step = statistics.median(own)
    bad = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    return Trial(
        steps=steps,
        length=length,
        step_seconds=step,
        frozen_seconds=statistics.median(frozen),
        ratio=statistics.median(a / b for a, b in zip(own, frozen, strict=True)),
        tokens_per_second=config.batch_size * length / step,
        peak=peak,
        losses=tuple(losses),
        orthonormality=orthonormality(stepper.model),
        left_out=left_out,
        failure=None if bad is None else f"the loss is {losses[bad - 1]} at step {bad}",
    )
