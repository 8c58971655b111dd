"""pyvene's ``subspaces`` as the engine's ``coeff``: which columns of R each example uses, and
with what factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _columns(
    chosen: object, partition: Sequence[Sequence[int]] | None, rank: int, example: int
) -> list[int]:
    where = f"subspaces: example {example}"
    count, unit = (
        (rank, "columns of R")
        if partition is None
        else (len(partition), "parts of subspace_partition")
    )
    if not isinstance(chosen, list | tuple):
        raise TypeError(
            f"{where}: got {type(chosen).__name__} {chosen!r}, expected a list of numbers of {unit}"
        )
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(f"{where}: got {number!r}, expected numbers of {unit} in [0, {count})")
    columns = (
        list(chosen)
        if partition is None
        else [column for number in chosen for column in partition[number]]
    )
    if any(not 0 <= column < rank for column in columns):
        raise ValueError(
            f"subspace_partition: got columns {columns} for {list(chosen)!r}, expected columns of "
            f"R in [0, {rank})"
        )
    if len(set(columns)) != len(columns):
        raise ValueError(f"{where}: got {list(chosen)!r}, in which a column stands more than once")
    return columns


def coefficients(
    subspaces: Sequence[Sequence[int]] | Tensor | None,
    scale: Tensor | None,
    partition: Sequence[Sequence[int]] | None,
    batch: int,
    rank: int,
    device: torch.device,
) -> Tensor | None:
    """Factors ``[batch, rank]`` in fp32: example i's columns of R have ``scale`` (1 without), all
    others 0; None if all are 1.

    Args:
        subspaces: for each example a list of columns (of parts, with a ``partition``); one list
            serves a whole batch.
        scale: ``[rank]``, such as +1, 0 or -1 for each column of R. partition: columns of each
            part.

    Raises:
        TypeError, ValueError: another number of examples, a number out of range or repeated.
    """
    if subspaces is None:
        return (
            None
            if scale is None
            else scale.to(device=device, dtype=torch.float32).expand(batch, rank)
        )
    lists = subspaces.tolist() if isinstance(subspaces, Tensor) else subspaces
    if not isinstance(lists, list | tuple):
        raise TypeError(
            f"subspaces: got {type(subspaces).__name__}, expected a list of columns for each "
            "example"
        )
    lists = [entry.tolist() if isinstance(entry, Tensor) else entry for entry in lists]
    if len(lists) not in (1, batch):
        raise ValueError(
            f"subspaces: got {len(lists)} lists, expected one for each of {batch} examples, or "
            "one for all"
        )
    table = torch.zeros(len(lists), rank, dtype=torch.float32)
    for example, chosen in enumerate(lists):
        table[example, _columns(chosen, partition, rank, example)] = 1.0
    table = table.to(device)
    if scale is not None:
        table = table * scale.to(device=device, dtype=torch.float32)
    return table.expand(batch, rank)
