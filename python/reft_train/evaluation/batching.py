"""A model run over many inputs without training: batches of similar length, shared out among
processes, results in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from reft_train.errors import UserError
from reft_train.progress import bar
from reft_train.ranks import merged, place

Result = TypeVar("Result")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode comes back at the end.

    Not inference mode: what a model keeps from one call to the next (rotary tables, say) must still
    serve training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_batches(
    lengths: Sequence[int],
    batch_size: int,
    forward: Callable[[list[int]], Sequence[Result]],
    title: str,
    progress: bool = True,
) -> list[Result]:
    """``forward`` over all inputs, in batches of neighbours by length, the longest first so that
    memory fails early.

    Under torch.distributed each process takes every n-th input, the same number of batches each,
    and all get all results.

    Args:
        lengths: tokens of each input. forward: numbers of a batch's inputs in, one result for each
            out.

    Returns:
        A result for each input, in the order of ``lengths``.

    Raises:
        UserError: a batch that does not fit the GPU's memory.
    """
    rank, processes = place()
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    share = -(-len(order) // processes)
    mine = order[rank::processes]
    if len(mine) < share:
        mine = [*mine, order[0]]  # sharded models need as many forwards on every process
    found: dict[int, Result] = {}
    with bar(len(mine), title, "row", show=progress and rank == 0) as shown:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            try:
                results = forward(batch)
            except torch.OutOfMemoryError:
                longest = max(lengths[index] for index in batch)
                raise UserError(
                    f"eval_batch_size: got {batch_size}, which does not fit the GPU's memory with "
                    f"{longest} tokens a row, "
                    "expected less"
                ) from None
            found.update(zip(batch, results, strict=True))
            shown.update(len(batch))
    found = merged(found)
    return [found[index] for index in range(len(lengths))]
