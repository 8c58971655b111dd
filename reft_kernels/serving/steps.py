"""Rows, weight sets and coefficients of one step of an engine, for all its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reft_kernels.checks import mark_rows
from reft_kernels.serving.adapters import Form, ServedAdapter
from reft_kernels.serving.bank import Bank, SlotKey
from reft_kernels.serving.positions import UNBOUNDED, EditedRange, covered


class Edit(NamedTuple):
    """The edit of one request.

    Attributes:
        content: Content hash of the adapter.
        ranges: The edited columns of the sequence.
        coefficient: Multiplies the update.
        subspaces: Subspaces to keep; None keeps all.
    """

    content: str
    ranges: tuple[EditedRange, ...]
    coefficient: float = 1.0
    subspaces: tuple[int, ...] | None = None

    @property
    def end(self) -> int:
        """The first column from which on nothing is edited."""
        return self.ranges[-1].end if self.ranges else 0

    @property
    def edits_replies(self) -> bool:
        """Whether generated tokens are edited."""
        return self.end >= UNBOUNDED

    def slot_keys(self) -> list[SlotKey]:
        """Return the weight sets that the edit uses."""
        return [(self.content, r.weight_set) for r in self.ranges]


class Scheduled(NamedTuple):
    """The tokens of one request in a step."""

    edit: Edit
    row: int  # of the first token, in the step's hidden states
    column: int  # of the first token, in its sequence
    size: int


class Group(NamedTuple):
    """Rows that one kernel launch edits.

    Attributes:
        form: Common to the adapters of all rows.
        rows: int64 ``[N]``.
        weight_ids: int32 ``[N]``, the slot of each row.
        coeff: fp32 ``[N, r]``, or None for 1.
    """

    form: Form
    rows: Tensor
    weight_ids: Tensor
    coeff: Tensor | None


class Step(NamedTuple):
    """The edits of a step: for each layer of the bank, the groups of its rows."""

    bank: Bank
    layers: list[tuple[Group, ...]]


class _Segment(NamedTuple):
    """Consecutive rows of one request, with one weight set."""

    edit: Edit
    row: int
    size: int
    weight_set: int


def _segments(scheduled: Sequence[Scheduled]) -> list[_Segment]:
    found = []
    for edit, row, column, count in scheduled:
        if column < edit.end:
            for low, high, weight_set in covered(edit.ranges, column, column + count):
                found.append(_Segment(edit, row + low - column, high - low, weight_set))
    return found


def build_step(
    scheduled: Sequence[Scheduled], adapters: Mapping[str, ServedAdapter], bank: Bank
) -> Step | None:
    """Compute the edits of a step, once for all layers, and bring their weights into the bank.

    Args:
        scheduled: The tokens of all requests with edits.
        adapters: The adapters on the host, by content hash.
        bank: The weights on the device.

    Returns:
        None if the step has no edited row.
    """
    segments = _segments(scheduled)
    if not segments:
        return None
    slots = bank.place([(s.edit.content, s.weight_set) for s in segments], adapters)
    edited = {s.edit.content: frozenset(adapters[s.edit.content].layers) for s in segments}
    made: dict[frozenset[str], tuple[Group, ...]] = {}
    layers = []
    for layer in bank.layers:
        active = frozenset(content for content, numbers in edited.items() if layer in numbers)
        if active not in made:
            chosen = [s for s in segments if s.edit.content in active]
            made[active] = tuple(_groups(chosen, slots, adapters, bank))
        layers.append(made[active])
    return Step(bank, layers)


def _groups(
    segments: Sequence[_Segment],
    slots: Mapping[SlotKey, int],
    adapters: Mapping[str, ServedAdapter],
    bank: Bank,
) -> list[Group]:
    by_form: dict[Form, list[_Segment]] = {}
    for segment in segments:
        by_form.setdefault(adapters[segment.edit.content].form, []).append(segment)
    return [_group(form, members, slots, bank) for form, members in by_form.items()]


def _group(
    form: Form, segments: Sequence[_Segment], slots: Mapping[SlotKey, int], bank: Bank
) -> Group:
    counts = [s.size for s in segments]
    rows = np.concatenate([np.arange(s.row, s.row + s.size, dtype=np.int64) for s in segments])
    ids = np.repeat(
        np.array([slots[s.edit.content, s.weight_set] for s in segments], np.int32), counts
    )
    coeff = None
    if any(s.edit.coefficient != 1.0 or s.edit.subspaces is not None for s in segments):
        coeff = np.repeat(np.stack([_factors(s.edit, bank.max_rank) for s in segments]), counts, 0)
    device = bank.write.device
    return Group(
        form,
        _on(rows, device),
        mark_rows(_on(ids, device), bank.slots),
        None if coeff is None else _on(coeff, device),
    )


def _factors(edit: Edit, rank: int) -> np.ndarray:
    factors = np.full(rank, edit.coefficient, np.float32)
    if edit.subspaces is not None:
        left_out = np.ones(rank, bool)
        left_out[list(edit.subspaces)] = False
        factors[left_out] = 0.0
    return factors


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
