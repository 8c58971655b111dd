"""Distributed process groups: early setup, and a joint exit if one process raises UserError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from reft_train.config import RunConfig
from reft_train.errors import ReportedError, UserError
from reft_train.models import pick_device
from reft_train.ranks import gathered, is_first, joined

Result = TypeVar("Result")


def join(config: RunConfig) -> None:
    """Create the process group if torchrun or accelerate launch started several processes.

    Engines use the existing group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        from accelerate import PartialState

        # the timeout covers tokenization on the first process
        PartialState(cpu=pick_device(config) == "cpu", timeout=timedelta(hours=2))


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
    from accelerate import PartialState

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
