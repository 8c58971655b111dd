"""Short trial training on random tokens: time, memory, finite losses, orthonormality of R."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reft_train import methods, models
from reft_train.config import RunConfig
from reft_train.errors import UserError, one_line
from reft_train.memory import Peak, PeakMeter
from reft_train.tasks.base import Task
from reft_train.training.session import quiet
from reft_train.training.trainer import orthonormality

MEMORY_STEPS = 2  # Adam's moments exist from the second step on
_LEFT_OUT = ("compile", "fsdp", "deepspeed", "packing")


@dataclass(frozen=True)
class MemoryTrial:
    """Measurements of a trial; ``failure`` is a one-line reason, None if it succeeded.

    Attributes:
        ratio: median ratio of a step's time to the frozen model's forward and backward time.
        peak: peak memory of the first steps.
        left_out: ignored settings.
    """

    steps: int
    length: int
    left_out: tuple[str, ...]
    step_seconds: float | None = None
    frozen_seconds: float | None = None
    ratio: float | None = None
    tokens_per_second: float | None = None
    peak: Peak | None = None
    losses: tuple[float, ...] = ()
    orthonormality: float | None = None
    failure: str | None = None


def random_batch(
    config: RunConfig, kind: str, hf_config: Any, length: int, generator: torch.Generator
) -> dict[str, Any]:
    """Create a batch of random tokens.

    A causal model learns the second half of the tokens, an encoder a random class.
    """
    size, vocabulary = (config.batch_size, length), hf_config.get_text_config().vocab_size
    tokens, labels = (torch.randint(vocabulary, size, generator=generator) for _ in range(2))
    if kind == models.CAUSAL:
        labels = tokens.clone()
        labels[:, : length // 2] = -100
    elif kind == models.CLASSIFICATION:
        count = hf_config.num_labels
        labels = labels[:, 0] % count if count > 1 else torch.rand(len(tokens), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class _Steps:
    """A model with its optimizer, for training steps and frozen forward and backward passes."""

    def __init__(self, config: RunConfig, task: Task, device: torch.device) -> None:
        loaded = models.load(config, task)
        self.config, self.device, self.kind = config, device, loaded.kind
        self.model = methods.adapt(config, loaded)
        if config.device_map == "none" and config.quantization == "none":
            self.model.to(device)
        loaded.model.config.use_cache = False  # as Trainer sets it
        if config.gradient_checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, config.lr, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)

    def batch(self, length: int) -> dict[str, Any]:
        hf_config = self.model.get_base_model().config
        made = random_batch(self.config, self.kind, hf_config, length, self.generator)
        return {name: value.to(self.device) for name, value in made.items()}

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.mixed_precision)
        with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            return self.model(**batch).loss

    def train(self, batch: dict[str, Any]) -> float:
        """Run one optimizer step and return its loss."""
        loss = self._loss(batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def frozen(self, batch: dict[str, Any]) -> None:
        """Run forward and backward through every frozen layer with the method disabled."""
        embedding = self.model.get_base_model().get_input_embeddings()
        hook = embedding.register_forward_hook(lambda m, args, out: out.detach().requires_grad_())
        trained = [p for p in self.trained if p.requires_grad]
        try:
            with self.model.disable_adapter():
                for parameter in trained:
                    parameter.requires_grad_(False)
                self._loss(batch).backward()
        finally:
            hook.remove()
            for parameter in trained:
                parameter.requires_grad_(True)

    def seconds(self, step: Callable[[dict], Any], batch: dict[str, Any]) -> tuple[float, Any]:
        """Return time and result of a step."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        started, result = time.perf_counter(), step(batch)
        wait()
        return time.perf_counter() - started, result


def run_trial(config: RunConfig, task: Task, steps: int, length: int) -> MemoryTrial:
    """Load and adapt the model, then train it.

    Runs ``MEMORY_STEPS`` steps under the memory meter, then ``steps`` timed ones.
    """
    quiet()
    left_out = tuple(name for name in _LEFT_OUT if getattr(config, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return MemoryTrial(steps, length, left_out, **_measured(config, task, steps, length))
    except UserError:  # bad input is not a failed step
        raise
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        failure = f"{type(error).__name__}: {one_line(error)}"
        return MemoryTrial(steps, length, left_out, failure=failure)
    finally:
        torch.set_num_threads(threads)


def _measured(config: RunConfig, task: Task, steps: int, length: int) -> dict[str, Any]:
    device = torch.device(models.pick_device(config))
    stepper, meter = _Steps(config, task, device), PeakMeter(device)
    # libraries allocate memory at first use
    stepper.frozen(stepper.batch(min(length, 16)))
    meter.start()
    losses = [stepper.train(stepper.batch(length)) for _ in range(MEMORY_STEPS)]
    peak = meter.stop()
    stepper.frozen(stepper.batch(length))  # allocates its memory before it is timed
    times: dict[str, list[float]] = {"train": [], "frozen": []}
    for number in range(steps):
        tokens = stepper.batch(length)
        for name in ("train", "frozen") if number % 2 else ("frozen", "train"):
            seconds, loss = stepper.seconds(getattr(stepper, name), tokens)
            times[name].append(seconds)
            losses += [loss] if name == "train" else []
    step, frozen = map(statistics.median, times.values())
    bad = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    return {
        "step_seconds": step,
        "frozen_seconds": frozen,
        "ratio": statistics.median(a / b for a, b in zip(*times.values(), strict=True)),
        "tokens_per_second": config.batch_size * length / step,
        "peak": peak,
        "losses": tuple(losses),
        "orthonormality": orthonormality(stepper.model),
        "failure": bad and f"the loss is {losses[bad - 1]} at step {bad}",
    }
