"""One training loop and one evaluation for every variant."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reft_train.demo.batching import Encoded
from reft_train.demo.settings import Settings
from reft_train.demo.variants import TITLES, Variant
from reft_train.progress import bar

WARMUP = 0.1  # part of the steps over which the learning rates rise; then they fall linearly
EVAL_BATCH = 128


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and the seconds that the steps took."""

    losses: list[float]
    seconds: float


def schedule(step: int, steps: int) -> float:
    """Factor of the learning rates at a step: linear warm-up, then linear decay."""
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def train(variant: Variant, data: Encoded, settings: Settings) -> Trained:
    """Train with AdamW and cross entropy; the order of batches depends on the seed alone.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = torch.device(settings.device)
    optimizer = torch.optim.AdamW(variant.groups(settings), weight_decay=0.0)
    steps = settings.epochs * math.ceil(len(data) / settings.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    losses: list[float] = []
    variant.model.train()
    torch.manual_seed(settings.seed)
    started = time.perf_counter()
    with bar(steps, TITLES[variant.name]) as progress:
        for epoch in range(settings.epochs):
            for indices in data.shuffled(settings.batch_size, settings.seed, epoch):
                batch = data.collate(indices).to(device)
                logits = variant.model(
                    input_ids=batch.input_ids, attention_mask=batch.attention_mask
                )
                loss = F.cross_entropy(logits, batch.labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(
                        f"{TITLES[variant.name]}: the loss is {losses[-1]} at step {len(losses)}"
                    )
                progress.set_postfix(
                    loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False
                )
                progress.update()
    return Trained(losses, time.perf_counter() - started)


@torch.no_grad()
def predict(model: nn.Module, data: Encoded, device: str) -> Tensor:
    """Logits ``[N, labels]`` on the CPU, in the order of the data."""
    model.eval()
    rows: list[Tensor | None] = [None] * len(data)
    for indices in data.by_length(EVAL_BATCH):
        batch = data.collate(indices).to(torch.device(device))
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).float().cpu()
        for index, row in zip(indices, logits, strict=True):
            rows[index] = row
    return torch.stack(rows)


def accuracy(logits: Tensor, data: Encoded) -> float:
    """Part of the examples whose highest logit is that of their class."""
    return (logits.argmax(1) == torch.tensor(data.classes)).float().mean().item()
