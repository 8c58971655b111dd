"""Time per step of each variant over the frozen model's own: interleaved in one process,
compared batch by batch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from reft_train.demo.batching import Batch, Encoded
from reft_train.demo.results import StepTimes
from reft_train.demo.settings import Settings
from reft_train.demo.variants import FROZEN, VARIANTS, Variant, build
from reft_train.progress import bar

REFERENCE = "reference"
WARMUP_ROUNDS = 3


def _require_input_gradient(model: nn.Module) -> None:
    """Let the embedding's output want a gradient, so that the backward runs through every frozen
    layer.
    """
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )


def _stepper(variant: Variant, settings: Settings) -> Callable[[Batch], None]:
    """A function that takes one training step: forward, backward, optimizer."""
    optimizer = torch.optim.AdamW(variant.groups(settings), weight_decay=0.0)
    variant.model.train()

    def step(batch: Batch) -> None:
        logits = variant.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        optimizer.zero_grad()
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()

    return step


def measure(settings: Settings, data: Encoded, num_labels: int) -> StepTimes:
    """Time training steps of all variants and of the reference: the frozen model's forward and
    input-gradient backward.

    The reference trains the same head. In each round every one of them takes a step on the same
    batch, in an order that rotates; a ratio is the median over rounds of a variant's time over the
    reference's in the same round.
    """
    device = torch.device(settings.device)
    torch.set_num_threads(settings.threads)
    reference = build(FROZEN, settings, num_labels)
    _require_input_gradient(reference.model)
    steppers = {REFERENCE: _stepper(reference, settings)}
    for name in VARIANTS:
        steppers[name] = _stepper(build(name, settings, num_labels), settings)
    order = list(steppers)
    batches = data.shuffled(settings.batch_size, settings.seed, 0)
    times: dict[str, list[float]] = {name: [] for name in order}
    with bar(WARMUP_ROUNDS + settings.timing_steps, "timing, interleaved", "round") as progress:
        for number in range(WARMUP_ROUNDS + settings.timing_steps):
            batch = data.collate(batches[number % len(batches)]).to(device)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                elapsed = _timed(steppers[name], batch, device)
                if number >= WARMUP_ROUNDS:
                    times[name].append(elapsed)
            progress.update()
    ratios = {
        name: statistics.median(
            own / base for own, base in zip(times[name], times[REFERENCE], strict=True)
        )
        for name in VARIANTS
    }
    seconds = {name: statistics.median(times[name]) for name in VARIANTS}
    return StepTimes(statistics.median(times[REFERENCE]), seconds, ratios, settings.timing_steps)


def _timed(step: Callable[[Batch], None], batch: Batch, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
