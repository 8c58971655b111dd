"""Held-out loss: a mean over labels, independent of batch size and number of processes.

transformers averages the means of batches, and pads the last batches of several processes with
repeated examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reft_train.ranks import merged, place

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
    device: Any,
) -> tuple[float, list[Any]]:
    """Return the mean loss over ``dataset``, and each example's logits if ``step`` returns them.

    Args:
        step: maps a batch to its mean loss and logits (None if not needed).
        shifted: whether token t predicts label t + 1, so that the first label of a row is unused.
    """
    rank, processes = place()
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset[index]["input_ids"]))
    indices, share = order[rank::processes], -(-len(order) // processes)
    logits_by_index: dict[int, Any] = {}
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, share, batch_size):
        batch = indices[start : start + batch_size]
        # sharded models need the same number of forwards on every process
        inputs = collate([dataset[index] for index in batch or order[:1]])
        count = learned(inputs["labels"], shifted)
        loss, logits = step(inputs)
        if batch and count:
            total += torch.stack(
                [loss.double() * count, torch.tensor(count, dtype=torch.float64, device=device)]
            )
        if logits is not None:
            # a repeated batch contributes nothing
            logits_by_index.update(zip(batch, logits.float().cpu(), strict=False))
    if processes > 1:
        dist.all_reduce(total)
    logits_by_index = merged(logits_by_index)
    return float(total[0] / total[1]), [logits_by_index[index] for index in sorted(logits_by_index)]
