"""Which of several processes this one is, and what all of them found; a single process is the
first of one.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def place() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (
        (dist.get_rank(), dist.get_world_size())
        if dist.is_available() and dist.is_initialized()
        else (0, 1)
    )


def joined() -> bool:
    """Whether this is one of several processes."""
    return place()[1] > 1


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return place()[0] == 0


def gathered(found: Result) -> list[Result]:
    """What each process found, in their order; every process gets all of it."""
    everyone: list[Result] = [found] * place()[1]
    if joined():
        dist.all_gather_object(everyone, found)
    return everyone


def merged(found: dict[int, Result]) -> dict[int, Result]:
    """What all processes found, each for numbers of its own."""
    return {number: result for part in gathered(found) for number, result in part.items()}
