"""The adapter of each example of a batch: the argument ``adapter_names`` of a call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_kernels.checks import mark_rows
from reft_kernels.model.selection import Selection
from reft_kernels.model.window import Window

BASE = "__base__"


class Members:
    """The adapter of each example of a running call.

    Traced code reads ``table`` and ``index`` only, so that a compiled forward serves other names of
    the same table without compiling again.

    Args:
        names: the adapter of each example; :data:`BASE` for none.
        table: the adapters that calls of the model have named so far, those of ``names`` included.
        device: device of the model.
    """

    def __init__(self, names: Sequence[str], table: tuple[str, ...], device: torch.device) -> None:
        self.names = tuple(names)
        self.table = table
        here = frozenset(names)
        self.present = tuple(name for name in table if name in here)
        numbers = {name: number for number, name in enumerate(table)}
        # the entry of BASE is the last one of a lookup table
        self._masks: dict[tuple[str, int], Tensor] = {}
        self.index = torch.tensor([numbers.get(name, len(table)) for name in names], device=device)

    def named(self) -> tuple[str, ...]:
        """The adapters that a forward must consider."""
        return self.table if torch.compiler.is_compiling() else self.present

    def numbers(self, window: Window) -> Tensor:
        """The number of each example's adapter in ``table``, int64 ``[B]``; its length for none.

        Each name stands for as many consecutive examples as generation makes of it, for beams or
        several sequences.

        Raises:
            ValueError: the batch is packed, or its size does not fit the names.
        """
        if window.packed is not None:
            raise unsupported_batch()
        count = self.index.shape[0]
        if not count or window.batch % count:
            raise ValueError(f"adapter_names: got {count} names for a batch of {window.batch}")
        index = self.index.to(window.device, non_blocking=True)
        return index if window.batch == count else index.repeat_interleave(window.batch // count)

    def mask(self, name: str, window: Window) -> Tensor:
        """The examples that use an adapter, bool ``[B]``; the same tensor in every forward."""
        key = (name, window.batch)
        if key not in self._masks:
            self._masks[key] = self.numbers(window) == self.table.index(name)
        return self._masks[key]

    def examples(self, names: Sequence[str], batch: int) -> list[int]:
        """The examples of a batch whose adapter is one of ``names``."""
        repeats = batch // len(self.names)
        return [example for example in range(batch) if self.names[example // repeats] in names]


def unsupported_batch() -> ValueError:
    """The error for a batch without examples of tokens."""
    return ValueError("adapter_names: expected a padded batch of tokens, one name for each example")


def join_selections(
    window: Window, parts: Sequence[tuple[Selection, Tensor]], first_set: Tensor | None, sets: int
) -> Selection:
    """One selection of the rows that each example's adapter edits.

    Args:
        window: the part of the batch that the forward processes.
        parts: selections of the whole batch, each with the examples that it serves, bool ``[B]``;
            no example is served twice.
        first_set: int32 ``[B]``, added to the weight ids of each example's rows; None if the
            adapters have no weight sets in common.
        sets: number of weight sets, which limits the result's weight ids; 1 for none.

    Returns:
        P entries for each example, P being the largest number among ``parts``; -1 where an example
        has fewer.
    """
    batch, width = window.batch, window.width
    joined = joined_ids = None
    for selection, serves in parts:
        rows, ids = selection.rows, selection.weight_ids
        if rows is None:
            rows = torch.arange(batch * width, device=window.device, dtype=torch.int32)
        rows = torch.where(serves.unsqueeze(1), rows.view(batch, -1), -1)
        ids = torch.zeros_like(rows) if ids is None else ids.view(batch, -1)
        if joined is None or joined_ids is None:
            joined, joined_ids = rows, ids
            continue
        missing = rows.shape[1] - joined.shape[1]
        pad = torch.nn.functional.pad
        if missing > 0:
            joined, joined_ids = pad(joined, (0, missing), value=-1), pad(joined_ids, (0, missing))
        elif missing < 0:
            rows, ids = pad(rows, (0, -missing), value=-1), pad(ids, (0, -missing))
        joined = torch.where(serves.unsqueeze(1), rows, joined)
        joined_ids = torch.where(serves.unsqueeze(1), ids, joined_ids)
    assert joined is not None and joined_ids is not None, "at least one part"
    marked = mark_rows(joined.flatten(), batch * width)
    if sets == 1:
        return Selection(marked, None)
    if first_set is not None:
        joined_ids = joined_ids + first_set.unsqueeze(1)
    return Selection(marked, mark_rows(joined_ids.flatten(), sets))
