"""Batched inference with batches of similar length and results in input order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from reft_train.errors import wrong
from reft_train.ranks import merged, place

Result = TypeVar("Result")


def bar(total: int, title: str, unit: str = "step", show: bool = True) -> Any:
    """Create a tqdm bar on stderr; without a terminal it is printed every ten seconds."""
    from tqdm import tqdm

    every = 0.2 if sys.stderr.isatty() else 10.0
    options = {"unit": unit, "mininterval": every, "maxinterval": every, "disable": not show}
    return tqdm(total=total, desc=f"{title:<26}", **options)


def run_batches(
    lengths: Sequence[int],
    batch_size: int,
    forward: Callable[[list[int]], Sequence[Result]],
    title: str,
    progress: bool = True,
) -> list[Result]:
    """Run ``forward`` on all inputs and return the results in input order.

    The longest inputs run first, so that out-of-memory errors occur early. Under torch.distributed
    each process takes every n-th input, and all processes receive all results.

    Args:
        lengths: tokens of each input.
        forward: maps the indices of a batch to one result per input.
    """
    rank, processes = place()
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    indices = order[rank::processes]
    if len(indices) < -(-len(order) // processes):
        # sharded models need the same number of forwards on every process
        indices = [*indices, order[0]]
    by_index: dict[int, Result] = {}
    with bar(len(indices), title, "row", show=progress and rank == 0) as shown:
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            try:
                results = forward(batch)
            except torch.OutOfMemoryError:
                longest = max(lengths[index] for index in batch)
                what = f"{batch_size}, which exceeds the GPU's memory with {longest} tokens a row"
                raise wrong("eval_batch_size", what, "less") from None
            by_index.update(zip(batch, results, strict=True))
            shown.update(len(batch))
    by_index = merged(by_index)
    return [by_index[index] for index in range(len(lengths))]
