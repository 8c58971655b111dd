"""pyreft's unit locations as rows, and what a slot that stands twice means to its gradient.

pyreft gathers the slots of ``locations [B, P]``, edits them and scatters them back. Slots of an
example may coincide (padding slots all point at column 0). They then write one value, so the edit
happens once; but the gradient of a scatter gives each of
the k slots the whole gradient of that row, so that its edit counts k times: both the parameters'
gradient and what goes on to the layers below are k times those of one edit.
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
    """The rows that several slots share: example, column and number of slots, int64 ``[K]``
    each.
    """

    examples: Tensor
    columns: Tensor
    slots: Tensor


class Selected(NamedTuple):
    """Locations on one hidden state ``[B, T, d]``."""

    rows: Tensor  # int32 [N] into hidden.view(-1, d), ascending, each once
    repeated: Repeated | None
    examples: Tensor  # int64 [B, 1]
    columns: Tensor  # int64 [B, P], every slot


class Locations:
    """The columns ``[B, P]`` that an intervention edits in one call; rows are built once for each
    shape of hidden state.

    Args:
        columns: nested lists or an integer tensor ``[B, P]``, non-negative. beams: the hidden state
            may hold a multiple of B sequences, each example's side by side (beam search, several
            returned sequences).

    Raises:
        TypeError: entries that are not integers. ValueError: another shape, or lists of different
            lengths.
    """

    def __init__(self, columns: Sequence[Sequence[int]] | Tensor, beams: bool) -> None:
        try:
            found = torch.as_tensor(columns, device="cpu")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"unit_locations: expected [batch][positions], rectangular: {error}"
            ) from None
        if found.dim() != 2:
            raise ValueError(
                f"unit_locations: got {describe(found)} for one intervention, expected "
                "[batch][positions]"
            )
        if found.numel() and (found.dtype.is_floating_point or found.dtype == torch.bool):
            raise TypeError(
                f"unit_locations: got positions of dtype {found.dtype}, expected integers"
            )
        self.columns = found.to(torch.int64)
        self.beams = beams
        self._known: dict[tuple[int, int, torch.device], Selected] = {}

    def on(self, hidden: Tensor) -> Selected:
        """The rows of ``hidden [B, T, d]``.

        Raises:
            ValueError: a position outside of the sequence, or a batch of another size.
        """
        batch, width = hidden.shape[:2]
        key = (batch, width, hidden.device)
        if key not in self._known:
            with torch.inference_mode(False):  # normal tensors: rows carry a mark of their version
                self._known[key] = self._select(batch, width, hidden.device)
        return self._known[key]

    def _select(self, batch: int, width: int, device: torch.device) -> Selected:
        columns, given = self.columns, self.columns.shape[0]
        if given != batch:
            if not (self.beams and given and batch % given == 0):
                raise ValueError(
                    f"unit_locations: got positions for {given} examples, expected {batch}, the "
                    "batch"
                )
            columns = columns.repeat_interleave(batch // given, dim=0)
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
    """Locations of ``count`` interventions from ``[interventions][batch][positions]``; None edits
    every position.

    Equal entries (pyreft passes the same positions for each layer) share one object, and so their
    rows.

    Raises:
        TypeError, ValueError: as :class:`Locations`, or fewer entries than interventions.
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
    found: list[Locations | None] = []
    for entry in nested[:count]:
        if entry is None:
            found.append(None)
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
        found.append(locations)
    return found


class _CountSlots(torch.autograd.Function):
    """The identity, whose backward multiplies the gradient of each shared row by its number of
    slots.
    """

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
    """After an edit in place: make its gradient count each shared row once for each of its
    slots, as a scatter's does.
    """
    if repeated is None or not (torch.is_grad_enabled() and hidden.requires_grad):
        return hidden
    return _CountSlots.apply(hidden, *repeated)
