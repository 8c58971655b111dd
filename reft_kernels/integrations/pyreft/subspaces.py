"""Conversion of pyvene's ``subspaces`` to the ``coeff`` argument of an edit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _columns(
    selected: object, partition: Sequence[Sequence[int]] | None, rank: int, example: int
) -> list[int]:
    """Return the columns of R that one entry of ``subspaces`` selects."""
    where = f"subspaces: example {example}"
    count, unit = (
        (rank, "columns of R")
        if partition is None
        else (len(partition), "parts of subspace_partition")
    )
    if not isinstance(selected, list | tuple):
        raise TypeError(
            f"{where}: got {type(selected).__name__} {selected!r}, expected a list of numbers of "
            f"{unit}"
        )
    for number in selected:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
            raise ValueError(f"{where}: got {number!r}, expected numbers of {unit} in [0, {count})")
    columns = (
        list(selected)
        if partition is None
        else [column for number in selected for column in partition[number]]
    )
    if any(not 0 <= column < rank for column in columns):
        raise ValueError(
            f"subspace_partition: got columns {columns} for {list(selected)!r}, expected columns "
            f"of R in [0, {rank})"
        )
    if len(set(columns)) != len(columns):
        raise ValueError(
            f"{where}: got {list(selected)!r}, in which a column occurs more than once"
        )
    return columns


def coefficients(
    subspaces: Sequence[Sequence[int]] | Tensor | None,
    scale: Tensor | None,
    partition: Sequence[Sequence[int]] | None,
    batch: int,
    rank: int,
    device: torch.device,
) -> Tensor | None:
    """Return the factor of each column of R for each example.

    Args:
        subspaces: For each example a list of columns, or of parts if there is a ``partition``. A
            single list applies to all examples. None selects all columns.
        scale: ``[rank]``, the factors of selected columns, such as +1, 0 or -1. None means 1.
        partition: The columns of each part, or None.
        batch: The number of examples.
        rank: The number of columns of R.
        device: Device of the result.

    Returns:
        fp32 ``[batch, rank]``, with 0 for columns that are not selected. None if all are 1.

    Raises:
        TypeError: If ``subspaces`` or one of its entries is not a list.
        ValueError: If the number of lists is wrong, or a number is out of range or repeated.
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
    for example, selected in enumerate(lists):
        table[example, _columns(selected, partition, rank, example)] = 1.0
    table = table.to(device)
    if scale is not None:
        table = table * scale.to(device=device, dtype=torch.float32)
    return table.expand(batch, rank)
