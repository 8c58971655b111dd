"""The loss on held-out examples: a mean over what is learned, whatever the batches and however many
processes share them.

transformers averages the batches' means, and fills the last batches of several processes with
examples for the second time.
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
    """How many labels of a batch the loss is a mean over: all numbers and classes, or tokens
    other than -100.
    """
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
    """The mean loss over ``dataset``, and the logits of each example where ``step`` gives them.

    Args:
        step: a batch in, its mean loss and logits (None: not needed) out. shifted: a label is
            predicted one token earlier, so the first one of a row is not.
    """
    rank, processes = place()
    order = sorted(range(len(dataset)), key=lambda index: -len(dataset[index]["input_ids"]))
    mine, share = order[rank::processes], -(-len(order) // processes)
    found: dict[int, Any] = {}
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, share, batch_size):
        batch = mine[start : start + batch_size]
        # sharded models need as many forwards on every process
        inputs = collate([dataset[index] for index in batch or order[:1]])
        count = learned(inputs["labels"], shifted)
        loss, logits = step(inputs)
        if batch and count:
            total += torch.stack(
                [loss.double() * count, torch.tensor(count, dtype=torch.float64, device=device)]
            )
        if logits is not None:
            found.update(
                zip(batch, logits.float().cpu(), strict=False)
            )  # none of a batch that only fills
    if processes > 1:
        dist.all_reduce(total)
    found = merged(found)
    return float(total[0] / total[1]), [found[index] for index in sorted(found)]
