"""Processes of a run: their group, and a joint exit on bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from reft_train.errors import ReportedError, UserError

Result = TypeVar("Result")


def join(*, cpu: bool) -> None:
    """Create the process group if torchrun or accelerate launch started several processes.

    Engines use the existing group.
    """
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
    state = PartialState()
    if not state.use_distributed:
        return prepare()
    error, result = None, None
    with state.local_main_process_first() if in_turn else contextlib.nullcontext():
        try:
            result = prepare()
        except UserError as refused:
            error = refused
    messages = gather_object([str(error)] if error else [])
    if messages:
        raise (UserError if state.is_main_process else ReportedError)(messages[0]) from error
    return result


def leave() -> None:
    """Destroy the process group at the end of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
