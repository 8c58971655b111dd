"""Short trial training on random tokens: time, memory, finite losses, orthonormality of R."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from reft_train import methods, models
from reft_train.config import RunConfig
from reft_train.doctor.environment import memory_of
from reft_train.errors import UserError, one_line
from reft_train.memory import Peak, PeakMeter
from reft_train.tasks.base import Task
from reft_train.training.session import quiet
from reft_train.training.trainer import orthonormality


@dataclass(frozen=True)
class Trial:
    """Measurements of a trial; ``failure`` is a one-line reason, None if it succeeded.

    Attributes:
        ratio: median ratio of a step's time to the frozen model's forward and backward time.
        peak: peak memory of two steps; Adam's moments exist from the second step on.
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
    size: int, kind: str, hf_config: Any, length: int, generator: torch.Generator
) -> dict[str, Any]:
    """Create a batch of random tokens.

    A causal model learns the second half of the tokens, an encoder a random class.
    """
    shape, vocabulary = (size, length), hf_config.get_text_config().vocab_size
    tokens, labels = (torch.randint(vocabulary, shape, generator=generator) for _ in range(2))
    if kind == models.CAUSAL:
        labels = tokens.clone()
        labels[:, : length // 2] = -100
    elif kind == models.CLASSIFICATION:
        count = hf_config.num_labels
        labels = labels[:, 0] % count if count > 1 else torch.rand(size, generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Disable the method, and make the backward run through every frozen layer."""
    embedding = model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda m, args, out: out.detach().requires_grad_())
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        with model.disable_adapter():
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def run_trial(config: RunConfig, task: Task, steps: int, length: int) -> Trial:
    """Load and adapt the model, then run ``steps`` timed training steps.

    Before them, steps on one example and on a batch measure the memory; a batch that would not fit
    is not tried.
    """
    quiet()
    left_out = ("compile", "fsdp", "deepspeed", "packing")
    left_out = tuple(name for name in left_out if getattr(config, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        return Trial(steps, length, left_out, **_measured(config, task, steps, length))
    except UserError:  # bad input is not a failed step
        raise
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        failure = f"{type(error).__name__}: {one_line(error)}"
        return Trial(steps, length, left_out, failure=failure)
    finally:
        torch.set_num_threads(threads)


def _measured(config: RunConfig, task: Task, steps: int, length: int) -> dict[str, Any]:
    device = torch.device(models.pick_device(config))
    loaded, meter = models.load(config, task), PeakMeter(device)
    model = methods.adapt(config, loaded).train()
    if config.device_map == "none" and config.quantization == "none":
        model.to(device)
    loaded.model.config.use_cache = False  # as Trainer sets it
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    losses: list[float] = []

    def batch(size: int) -> dict[str, Any]:
        made = random_batch(size, loaded.kind, loaded.model.config, length, generator)
        return {name: value.to(device) for name, value in made.items()}

    def loss_of(inputs: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            return model(**inputs).loss

    def train(inputs: dict[str, Any]) -> None:
        loss = loss_of(inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    def frozen(inputs: dict[str, Any]) -> None:
        with _frozen(model):
            loss_of(inputs).backward()

    def peak_of(size: int) -> Peak:
        meter.start()
        train(batch(size))
        train(batch(size))
        return meter.stop()

    def seconds(step: Callable, inputs: dict[str, Any]) -> float:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        step(inputs)
        wait()
        return time.perf_counter() - started

    train(batch(1))  # libraries allocate memory at first use
    one = peak_of(1)
    needed = (one.peak - one.before) * config.batch_size
    free = memory_of(device.type).free / 2**20
    if needed > free:
        what = f"a batch needs about {needed:,.0f} MiB, {free:,.0f} MiB are free"
        hint = "--gradient-checkpointing, or a smaller --batch-size with more --accumulation"
        raise MemoryError(f"{what}; consider {hint}")
    peak, times = peak_of(config.batch_size), []
    frozen(batch(config.batch_size))  # allocates its memory before it is timed
    for number in range(steps):
        inputs, order = batch(config.batch_size), (train, frozen)
        pair = {step: seconds(step, inputs) for step in (order if number % 2 else order[::-1])}
        times.append((pair[train], pair[frozen]))
    step, alone = (statistics.median(part) for part in zip(*times, strict=True))
    bad = next((number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    return {
        "step_seconds": step,
        "frozen_seconds": alone,
        "ratio": statistics.median(a / b for a, b in times),
        "tokens_per_second": config.batch_size * length / step,
        "peak": peak,
        "losses": tuple(losses),
        "orthonormality": orthonormality(model),
        "failure": bad and f"the loss is {losses[bad - 1]} at step {bad}",
    }
