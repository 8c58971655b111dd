"""The arguments ``subspaces`` and ``strengths`` of a call: how much of each example's edit applies.

An edit y = x + Bᵀ u becomes y = x + Bᵀ (coeff * u), where coeff is the strength of the example in
the columns that its subspaces name, and 0 in the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.checks import describe
from reft_kernels.model.explicit_arguments import repeat_examples

_PAD, _ALL = -1, -2  # entries of Scaling.columns


class Examples(NamedTuple):
    """The examples of a forward.

    Attributes:
        number: number of examples, or of the sequences of a packed batch; None if not known.
        repeated: whether the number may be a multiple of the call's, as for beams.
        device: device of the results.
    """

    number: int | None
    repeated: bool
    device: torch.device


class Scaling:
    """The checked arguments ``subspaces`` and ``strengths`` of one call.

    Args:
        subspaces: columns of the rank for all examples, a list or integer tensor ``[C]``; or for
            each example, a list of such lists, in which None stands for all columns, or an integer
            tensor ``[B, C]`` padded with -1. None: all columns.
        strengths: a number for all examples, or one for each: a list or tensor ``[B]``. None: 1.

    Attributes:
        columns: int64 ``[entries, C]`` padded with -1; -2 stands for all columns. None: all.
        same_columns: whether ``columns`` has one entry for all examples.
        strengths: fp32 ``[entries]``; None: 1.
        same_strengths: whether ``strengths`` has one entry for all examples.

    Raises:
        TypeError: an argument or an entry has another type.
        ValueError: a tensor has another shape, a column is negative or repeated, or a strength is
            not finite. Values of tensors are not checked while ``torch.compile`` traces.
    """

    def __init__(self, subspaces: Any, strengths: Any) -> None:
        self.largest: int | None = None  # column; None: not known
        self.columns, self.same_columns = self._checked_columns(subspaces)
        self.strengths, self.same_strengths = _checked_strengths(strengths)

    @property
    def same(self) -> bool:
        """Whether all examples have the same columns and strength."""
        return self.same_columns and self.same_strengths

    def coefficients(self, rank: int, examples: Examples) -> Tensor:
        """The coefficient of each column: fp32 ``[B, rank]``, or ``[1, rank]`` for all examples."""
        table = torch.ones(1, rank, device=examples.device)
        if self.columns is not None:
            columns = self.columns_of(examples).unsqueeze(-1)
            numbers = torch.arange(rank, device=examples.device)
            table = ((columns == numbers) | (columns == _ALL)).any(dim=1).to(table.dtype)
        if self.strengths is not None:
            table = table * self.factors(examples).unsqueeze(1)
        return table

    def factors(self, examples: Examples) -> Tensor:
        """The strengths: fp32 ``[B]``, or ``[1]`` for all examples."""
        if self.strengths is None:
            return torch.ones(1, device=examples.device)
        return _entries("strengths", self.strengths, self.same_strengths, examples)

    def columns_of(self, examples: Examples) -> Tensor:
        """The columns of each example: int64 ``[B, C]``, or ``[1, C]`` for all examples."""
        assert self.columns is not None
        return _entries("subspaces", self.columns, self.same_columns, examples)

    def check_count(self, count: int) -> None:
        """Raise ValueError unless the arguments have an entry for each of ``count`` examples."""
        for name, value, same in (
            ("subspaces", self.columns, self.same_columns),
            ("strengths", self.strengths, self.same_strengths),
        ):
            if value is not None and not same:
                _check_count(name, value, count)

    def check(
        self, name: str, rank: int | None, examples: Examples, chosen: Sequence[int] | None = None
    ) -> None:
        """Check the number of entries, and the columns against an adapter's rank.

        Args:
            name: name of the adapter.
            rank: its rank; None for RED.
            examples: the examples of the forward.
            chosen: numbers of the examples that use the adapter; None for all.

        Raises:
            ValueError: a wrong number of entries, a column that the adapter does not have, or
                columns for RED.
        """
        self.factors(examples)
        if self.columns is None:
            return
        if torch.compiler.is_compiling():
            largest, all_columns = self.largest, False
        else:
            columns = self.columns_of(examples)
            if chosen is not None and not self.same_columns:
                columns = columns[list(chosen)]
            largest = int(columns.max()) if columns.numel() else _PAD
            all_columns = bool((columns == _ALL).any(dim=1).all())
        if rank is None and not all_columns:
            raise ValueError(
                f"subspaces: got columns for adapter {name!r}, expected None: RED has no subspace"
            )
        if rank is not None and largest is not None and largest >= rank:
            raise ValueError(
                f"subspaces: got column {largest}, expected columns below {rank}, the rank of "
                f"adapter {name!r}"
            )

    def _checked_columns(self, value: Any) -> tuple[Tensor | None, bool]:
        if value is None:
            return None, True
        if isinstance(value, Tensor):
            if value.dtype not in (torch.int32, torch.int64) or value.dim() not in (1, 2):
                raise ValueError(
                    f"subspaces: got {describe(value)}, expected integer columns [C] or [B, C]"
                )
            columns = value.to(torch.int64).view(-1, value.shape[-1])
            if not torch.compiler.is_compiling():
                self._check_entries([[c for c in row if c != _PAD] for row in columns.tolist()])
            return columns, value.dim() == 1
        if not isinstance(value, list | tuple):
            raise TypeError(f"subspaces: got {describe(value)}, expected a list of columns")
        same = not any(entry is None or isinstance(entry, list | tuple) for entry in value)
        entries = [value] if same else value
        for entry in entries:
            if not (entry is None or isinstance(entry, list | tuple)):
                raise TypeError(
                    f"subspaces: got {describe(entry)} among the examples' entries, expected a "
                    "list of columns or None"
                )
        self._check_entries([entry for entry in entries if entry is not None])
        rows = [[_ALL] if entry is None else list(entry) for entry in entries]
        width = max(map(len, rows))
        padded = [row + [_PAD] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), width), same

    def _check_entries(self, entries: Sequence[Sequence[Any]]) -> None:
        for columns in entries:
            for column in columns:
                if isinstance(column, bool) or not isinstance(column, int):
                    raise TypeError(f"subspaces: got {describe(column)}, expected integer columns")
                if column < 0:
                    raise ValueError(f"subspaces: got column {column}, expected at least 0")
            if len(set(columns)) < len(columns):
                raise ValueError(f"subspaces: got {list(columns)}, expected each column once")
        self.largest = max([_PAD, *(column for columns in entries for column in columns)])


def _checked_strengths(value: Any) -> tuple[Tensor | None, bool]:
    if value is None:
        return None, True
    if isinstance(value, Tensor):
        if value.dim() > 1 or value.dtype == torch.bool or value.dtype.is_complex:
            raise ValueError(f"strengths: got {describe(value)}, expected a number or [B]")
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"strengths: got {value.tolist()}, expected finite numbers")
        return value.to(torch.float32).reshape(-1), value.dim() == 0
    same = not isinstance(value, list | tuple)
    numbers = [value] if same else list(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(
                f"strengths: got {describe(number)}, expected a number, or one for each example"
            )
        if not math.isfinite(number):
            raise ValueError(f"strengths: got {number}, expected finite numbers")
    return torch.tensor(numbers, dtype=torch.float32), same


def _entries(name: str, value: Tensor, same: bool, examples: Examples) -> Tensor:
    """The entries ``[entries, ...]`` of an argument for each example; one if they are the same."""
    value = value.to(examples.device, non_blocking=True)
    count = examples.number
    if same or count is None or value.shape[0] == count:
        return value
    if not examples.repeated:
        _check_count(name, value, count)
    return repeat_examples(value, count, name)


def _check_count(name: str, value: Tensor, count: int) -> None:
    if value.shape[0] != count:
        raise ValueError(
            f"{name}: got {value.shape[0]} entries, expected {count}, one for each example"
        )
