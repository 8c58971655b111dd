"""Processes of a run: rank, exchange of results, process group, and a joint exit on bad input.

A single process is rank 0 of 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState

from reft_train.errors import ReportedError, UserError

Result = TypeVar("Result")


def place() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    joint = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joint else (0, 1)


def joined() -> bool:
    return place()[1] > 1


def is_first() -> bool:
    """Whether this is the process that prints."""
    return place()[0] == 0


def gathered(result: Result) -> list[Result]:
    """Gather a result from every process, in rank order, on all processes."""
    results: list[Result] = [result] * place()[1]
    if joined():
        dist.all_gather_object(results, result)
    return results


def join(*, cpu: bool) -> None:
    """Create the process group if torchrun or accelerate launch started several processes.

    Engines use the existing group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # the timeout covers tokenization on the first process
        PartialState(cpu=cpu, timeout=timedelta(hours=2))


def together(prepare: Callable[[], Result], *, in_turn: bool = False) -> Result:
    """Run ``prepare()`` and raise on all processes if any of them fails.

    ``prepare`` must not communicate with other processes.

    Args:
        in_turn: run the first process of each machine first, so that the others can use its caches.

    Raises:
        UserError: in the first process, whichever process failed.
        ReportedError: in the other processes.
    """
    if not joined():
        return prepare()
    error, result = None, None
    first = PartialState().local_main_process_first() if in_turn else contextlib.nullcontext()
    with first:
        try:
            result = prepare()
        except UserError as refused:
            error = refused
    messages = [text for text in gathered(error and str(error)) if text is not None]
    if messages:
        raise (UserError if is_first() else ReportedError)(messages[0]) from error
    return result


def leave() -> None:
    """Destroy the process group at the end of a program."""
    if joined():
        dist.destroy_process_group()
