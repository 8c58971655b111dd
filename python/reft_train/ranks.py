"""Rank of this process and exchange of results; a single process is rank 0 of 1."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

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


def merged(results: dict[int, Result]) -> dict[int, Result]:
    """Merge the dictionaries of all processes, whose keys are disjoint."""
    return {number: result for part in gathered(results) for number, result in part.items()}
