"""Held-out loss: a mean over labels, independent of batch size and number of processes.

transformers averages the means of batches, and pads the last batches of several processes with
repeated examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reft_train.ranks import gathered, place

Step = Callable[[dict], tuple[Tensor, Tensor | None]]


def learned(labels: Tensor, shifted: bool) -> int:
    """Count the labels in a batch's loss: all numbers and classes, or tokens other than -100."""
    if labels.ndim == 1:
        return len(labels)
    return int((labels[:, 1:] if shifted else labels).ne(-100).sum())


def held_out(
    step: Step,
    dataset: Sequence[dict],
    collate: Callable[[list[dict]], dict],
    batch_size: int,
    shifted: bool,
) -> tuple[float, list[Any]]:
    """Return the mean loss over ``dataset``, and each example's logits if ``step`` returns them.

    Args:
        step: maps a batch to its mean loss and logits (None if not needed).
        shifted: whether token t predicts label t + 1, so that the first label of a row is unused.
    """
    rank, processes = place()
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset[index]["input_ids"]))
    indices, share = order[rank::processes], -(-len(order) // processes)
    losses, logits_by_index = [], {}
    for start in range(0, share, batch_size):
        batch = indices[start : start + batch_size]
        # sharded models need the same number of forwards on every process
        inputs = collate([dataset[index] for index in batch or order[:1]])
        count = learned(inputs["labels"], shifted)
        loss, logits = step(inputs)
        if batch and count:
            losses.append((loss.double().item() * count, count))
        if logits is not None:
            # a repeated batch contributes nothing
            logits_by_index.update(zip(batch, logits.float().cpu(), strict=False))
    shares = gathered((losses, logits_by_index))
    total, count = torch.tensor(
        [pair for part, _ in shares for pair in part], dtype=torch.float64
    ).sum(0)
    logits = {index: row for _, part in shares for index, row in part.items()}
    return float(total / count), [logits[index] for index in sorted(logits)]
