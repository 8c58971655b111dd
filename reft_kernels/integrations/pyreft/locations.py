"""Conversion of pyreft's unit locations to rows, and the gradient of repeated locations.

pyreft gathers the positions given by ``locations [B, P]``, edits them and scatters them back.
Positions of an example may be repeated (padding entries all select column 0). A repeated position
is written once, but in the backward pass of the scatter each of its k entries receives the full
gradient of the row. The gradients of the parameters and of the input are therefore k times those
of a single edit; :func:`count_slots` reproduces this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import ownership
from reft_kernels.checks import describe, mark_rows


class Repeated(NamedTuple):
    """The rows that are selected by several entries."""

    examples: Tensor  # int64 [K]
    columns: Tensor  # int64 [K]
    slots: Tensor  # int64 [K], number of entries


class Selected(NamedTuple):
    """Locations in hidden states ``[B, T, d]``."""

    rows: Tensor  # int32 [N], rows of hidden.view(-1, d), distinct and ascending
    repeated: Repeated | None
    examples: Tensor  # int64 [B, 1]
    columns: Tensor  # int64 [B, P], all entries


class Locations:
    """The columns that an intervention edits in one call.

    The rows are computed once for each shape of the hidden states.

    Args:
        columns: Nested lists or an integer tensor ``[B, P]``, non-negative.
        beams: Whether the hidden states may hold a multiple of B sequences, with those of an
            example adjacent (beam search, several returned sequences).

    Raises:
        TypeError: If the entries are not integers.
        ValueError: If the shape is wrong or the lists differ in length.
    """

    def __init__(self, columns: Sequence[Sequence[int]] | Tensor, beams: bool) -> None:
        try:
            tensor = torch.as_tensor(columns, device="cpu")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"unit_locations: expected [batch][positions], rectangular: {error}"
            ) from None
        if tensor.dim() != 2:
            raise ValueError(
                f"unit_locations: got {describe(tensor)} for one intervention, expected "
                "[batch][positions]"
            )
        if tensor.numel() and (tensor.dtype.is_floating_point or tensor.dtype == torch.bool):
            raise TypeError(
                f"unit_locations: got positions of dtype {tensor.dtype}, expected integers"
            )
        self.columns = tensor.to(torch.int64)
        self.beams = beams
        self._known: dict[tuple[int, int, torch.device], Selected] = {}

    def on(self, hidden: Tensor) -> Selected:
        """Return the locations in ``hidden [B, T, d]``.

        Raises:
            ValueError: If a position is outside the sequence, or the batch has another size.
        """
        batch, width = hidden.shape[:2]
        key = (batch, width, hidden.device)
        if key not in self._known:
            # Not inference tensors, which have no version counter and cannot be marked as checked
            with torch.inference_mode(False):
                self._known[key] = self._select(batch, width, hidden.device)
        return self._known[key]

    def _select(self, batch: int, width: int, device: torch.device) -> Selected:
        columns, count = self.columns, self.columns.shape[0]
        if count != batch:
            if not (self.beams and count and batch % count == 0):
                raise ValueError(
                    f"unit_locations: got positions for {count} examples, expected {batch}, the "
                    "batch"
                )
            columns = columns.repeat_interleave(batch // count, dim=0)
        if columns.numel():
            low, high = (int(v) for v in torch.aminmax(columns))
            if low < 0 or high >= width:
                raise ValueError(
                    f"unit_locations: got positions from {low} to {high}, expected them in [0, "
                    f"{width})"
                )
        examples = torch.arange(batch).unsqueeze(1)
        rows, slots = torch.unique(columns + examples * width, return_counts=True)
        several = slots > 1
        repeated = None
        if bool(several.any()):
            shared = rows[several]
            parts = (shared // width, shared % width, slots[several])
            repeated = Repeated(*(t.to(device, non_blocking=True) for t in parts))
        on_device = mark_rows(rows.to(device, torch.int32, non_blocking=True), batch * width)
        return Selected(on_device, repeated, examples.to(device), columns.to(device))


def read_locations(nested: Sequence[Any], count: int, beams: bool) -> list[Locations | None]:
    """Return the locations of each intervention.

    Equal entries (pyreft passes the same positions for each layer) share one object and its rows.

    Args:
        nested: ``[interventions][batch][positions]``; None instead of an intervention's entry
            selects all positions.
        count: The number of interventions.
        beams: See :class:`Locations`.

    Raises:
        TypeError: If a position is not an integer, or ``nested`` is not a sequence.
        ValueError: If there are fewer entries than interventions, or an entry is invalid.
    """
    if not isinstance(nested, Sequence | Tensor):
        raise TypeError(
            f"unit_locations: got {describe(nested)}, expected [interventions][batch][positions]"
        )
    if len(nested) < count:
        raise ValueError(
            f"unit_locations: got positions for {len(nested)} interventions, expected {count}"
        )
    seen: list[tuple[Any, Locations]] = []
    result: list[Locations | None] = []
    for entry in nested[:count]:
        if entry is None:
            result.append(None)
            continue
        same = (
            known
            for other, known in seen
            if entry is other or (isinstance(entry, list) and entry == other)
        )
        locations = next(same, None)
        if locations is None:
            locations = Locations(entry, beams)
            seen.append((entry, locations))
        result.append(locations)
    return result


class _CountSlots(torch.autograd.Function):
    """Identity whose backward multiplies the gradient of each repeated row by its entry count."""

    @staticmethod
    def forward(ctx, hidden, examples, columns, slots):
        ctx.save_for_backward(examples, columns, slots)
        ctx.mark_dirty(hidden)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        may_overwrite = ownership.is_sole_owner(grad)
        examples, columns, slots = ctx.saved_tensors
        out = grad if may_overwrite else grad.clone()
        out[examples, columns] *= slots.unsqueeze(1)
        return out, None, None, None


def count_slots(hidden: Tensor, repeated: Repeated | None) -> Tensor:
    """Multiply, in the backward pass, the gradient of repeated rows by their number of entries.

    Args:
        hidden: ``[B, T, d]``, the result of an edit in place.
        repeated: The repeated rows, or None.

    Returns:
        ``hidden``, unchanged.
    """
    if repeated is None or not (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    return _CountSlots.apply(hidden, *repeated)
