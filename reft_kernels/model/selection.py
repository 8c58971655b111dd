"""From a window of a batch to the rows that one adapter edits there, and those rows on the
tensor that a module really has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels import positions
from reft_kernels.checks import describe, mark_rows
from reft_kernels.model.call_state import ModelCall
from reft_kernels.model.response_rule import Template
from reft_kernels.positions import Spec

if TYPE_CHECKING:
    from reft_kernels.model.prompts import Window


class PositionRule(NamedTuple):
    """Which tokens an adapter edits: the spec, whether first and last have their own weights,
    where a response starts.
    """

    spec: Spec
    untied: bool = False
    template: Template | None = None


class Selection(NamedTuple):
    """Rows of ``hidden.view(-1, d)`` (None: all), and the weight set of each row where prefix
    and suffix are untied.
    """

    rows: Tensor | None
    weight_ids: Tensor | None


def repeat_examples(tensor: Tensor, batch: int, name: str) -> Tensor:
    """One entry for each example as one for each row of the batch: beams and returned sequences
    repeat theirs.
    """
    count = tensor.shape[0]
    if count == batch:
        return tensor
    if count == 0 or batch % count:
        raise ValueError(f"{name}: got {count} examples, expected {batch}")
    return tensor.repeat_interleave(batch // count, dim=0)


def explicit_lengths(
    value: Any, batch: int, limits: Tensor | int | None, device: torch.device
) -> Tensor:
    """``prompt_lengths`` as int64 ``[B]``, checked.

    Args:
        limits: the most tokens that each example's prompt can have; None: no limit, a part of the
            prompt is still to come.
    """
    lengths = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"prompt_lengths: got {describe(lengths)}, expected one integer for each example, [B]"
        )
    lengths = repeat_examples(lengths.to(device=device, dtype=torch.int64), batch, "prompt_lengths")
    if not torch.compiler.is_compiling():
        wrong = lengths < 0 if limits is None else (lengths < 0) | (lengths > limits)
        if bool(wrong.any()):
            example = int(wrong.to(torch.int8).argmax())
            expected = "at least 0"
            if limits is not None:
                limit = limits if isinstance(limits, int) else int(limits[example])
                expected = f"0 to {limit}, the tokens it has"
            raise ValueError(
                f"prompt_lengths: got {int(lengths[example])} for example {example}, expected "
                f"{expected}"
            )
    return lengths


def select(window: Window, rule: PositionRule) -> Selection | None:
    """The rows that ``rule`` selects in a window; None when there are none, as in every decoding
    step of a prompt's edit.

    Raises:
        ValueError: explicit arguments that do not fit the batch.
    """
    if window.call.edit_positions is not None:
        return _from_positions(window, rule.untied)
    spec = rule.spec
    if spec.kind == "all" and not rule.untied:
        return Selection(_real_rows(window), None)
    if window.packed is not None:
        return _from_packed(window, rule)
    lengths = window.prompt_lengths(rule.template)
    if lengths is None:
        return None
    rows = positions.prompt_rows(
        spec, window.starts, lengths, window.width, token_mask=window.tokens, offset=window.offset
    )
    return Selection(
        rows,
        positions.weight_ids(spec, window.batch, device=window.device) if rule.untied else None,
    )


def _real_rows(window: Window) -> Tensor | None:
    """Rows of real tokens, None for all; where asking costs a synchronisation a mask is taken to
    hide something.
    """
    tokens = window.tokens
    if tokens is None or window.lengths is None:
        return None
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(tokens.all()):
        return None
    return positions.from_mask(tokens)


def _from_positions(window: Window, untied: bool) -> Selection | None:
    chosen = window.call.edit_positions
    if not isinstance(chosen, Tensor):
        chosen = torch.as_tensor(chosen)
    if window.lengths is None and window.packed is None:
        return None
    chosen = repeat_examples(chosen.to(window.device), window.batch, "edit_positions")
    compiling, offset = torch.compiler.is_compiling(), window.offset
    if chosen.dtype == torch.bool and not untied:
        if chosen.dim() != 2 or not (chosen.shape[1] <= window.total or window.continues):
            raise ValueError(
                f"edit_positions: got {describe(chosen)}, expected a mask ({window.batch}, "
                f"{window.total})"
            )
        here = chosen[:, offset : offset + window.width]
        return Selection(
            positions.from_mask(torch.nn.functional.pad(here, (0, window.width - here.shape[1]))),
            None,
        )
    if chosen.dim() != 2 or chosen.dtype not in (torch.int32, torch.int64):
        expected = "integer columns [B, P]" + ("" if untied else " or a bool mask [B, T]")
        raise ValueError(f"edit_positions: got {describe(chosen)}, expected {expected}")
    if not compiling:
        limit = int(window.total)
        if window.continues and chosen.numel():
            limit = max(limit, int(chosen.max()) + 1)
        positions.from_indices(chosen, limit)  # columns out of range or repeated are refused here
    columns = chosen - offset
    base = torch.arange(window.batch, device=window.device).unsqueeze(1) * window.width
    skipped = (chosen < 0) | (columns < 0) | (columns >= window.width)
    rows = torch.where(skipped, -1, columns + base).to(torch.int32).flatten()
    rows = mark_rows(rows, window.batch * window.width)
    if not untied:
        return Selection(rows, None)
    count = columns.shape[1]
    if count % 2:
        raise ValueError(
            f"edit_positions: got {count} columns, expected an even number: share_weights=False "
            "halves them"
        )
    ids = (
        (torch.arange(count, device=window.device) >= count // 2)
        .to(torch.int32)
        .repeat(window.batch)
    )
    return Selection(rows, mark_rows(ids, 2))


def _from_packed(window: Window, rule: PositionRule) -> Selection:
    """Rows of a packed batch, whose position ids restart with each sequence: one entry a token."""
    packed, spec, device = window.packed, rule.spec, window.device
    prompt, place = window.packed_prompt(rule.template), packed.place
    count = place.shape[0]
    index = torch.arange(count, device=device)
    length = torch.zeros(count, dtype=torch.int64, device=device)
    length = length.index_add_(0, packed.sequence, prompt.to(torch.int64))[packed.sequence]
    last = torch.zeros_like(prompt)
    if spec.kind == "ends":
        length = (length - 1).clamp(min=0) if spec.pyreft else length
        prompt = prompt & (place < length)
        available = length // 2 if spec.halves else length
        last = prompt & (place >= length - available.clamp(max=spec.last))
        prompt = (prompt & (place < available.clamp(max=spec.first))) | last
    rows = torch.where(prompt, index, -1).to(torch.int32)
    ids = last.to(torch.int32) if rule.untied else None
    if device.type == "cpu" and not torch.compiler.is_compiling():
        rows, ids = rows[prompt], None if ids is None else ids[prompt]
    return Selection(mark_rows(rows, count), None if ids is None else mark_rows(ids, 2))


# ---- rows of their own


class DeferredSelection:
    """A selection that waits for the hidden state, whose rows the call's tokens do not count:
    images, audio frames.

    All of ``[B, T, d]`` is prompt unless the call says where it ends (where it names no tokens,
    which that would mean).
    """

    def __init__(self, rule: PositionRule, call: ModelCall, frame_mask: Any = None) -> None:
        self.rule = rule
        self.call = call
        self.frame_mask = frame_mask  # (frames, audio mask) -> bool [B, frames]
        self._known: dict[tuple, Selection | None] = {}

    def select(self, hidden: Tensor) -> Selection | None:
        """The rows of ``hidden [B, T, d]`` or ``[N, d]``."""
        key = (hidden.shape[:-1], hidden.device)
        if key not in self._known:
            self._known[key] = self._select(hidden)
        return self._known[key]

    def _select(self, hidden: Tensor) -> Selection | None:
        from reft_kernels.model.prompts import window_of_shape

        return select(
            window_of_shape(hidden.shape, hidden.device, self.call, self.frame_mask), self.rule
        )


# ---- on the tensor that a module has


class TokenShape(NamedTuple):
    """The tokens ``[batch, width]`` that rows were counted for."""

    batch: int
    width: int


def place_rows(
    selection: Selection, tokens: TokenShape, hidden: Tensor, layout: str
) -> Selection | None:
    """Rows counted for ``tokens`` as rows of ``hidden [..., d]``; None where that is not the tensor
    they were counted for.

    Compares sizes on the host alone. Layouts of ``hidden``:

        "btd"          ``[B, T, d]`` or flattened ``[B * T, d]``
        "btd_padded"   ``[B, T', d]`` with T' >= T: the model pads the sequence on the right
        "tbd"          ``[T, B, d]``
        "btsd"         ``[B, T, S, d]``: every one of S streams of a token
        "sbtd"         ``[S, B, T, d]``
    """
    batch, width = tokens
    lead = tuple(hidden.shape[:-1])
    if layout in ("btd", "btd_padded") and lead in ((batch, width), (batch * width,)):
        return selection
    if layout == "btd_padded" and len(lead) == 2 and lead[0] == batch and lead[1] > width:
        rows = selection.rows
        if rows is None:
            rows = torch.arange(batch * width, device=hidden.device, dtype=torch.int32)
        return _moved(
            rows, selection.weight_ids, (rows // width) * lead[1] + rows % width, batch * lead[1]
        )
    if layout == "tbd" and lead == (width, batch):
        rows = selection.rows
        if rows is None:
            return selection
        return _moved(
            rows, selection.weight_ids, (rows % width) * batch + rows // width, batch * width
        )
    if layout == "btsd" and len(lead) == 3 and lead[:2] == (batch, width):
        return _streams(selection, tokens, lead[2], 1, lead[2])
    if layout == "sbtd" and len(lead) == 3 and lead[1:] == (batch, width):
        return _streams(selection, tokens, lead[0], batch * width, 1)
    return None


def _moved(rows: Tensor, weight_ids: Tensor | None, numbers: Tensor, count: int) -> Selection:
    return Selection(
        mark_rows(torch.where(rows < 0, -1, numbers).to(torch.int32), count), weight_ids
    )


def _streams(
    selection: Selection, tokens: TokenShape, streams: int, step: int, stride: int
) -> Selection:
    """Every stream of each row: row n of stream s is ``n * stride + s * step``."""
    if selection.rows is None:
        return selection
    rows = selection.rows.unsqueeze(1)
    offsets = torch.arange(streams, device=rows.device, dtype=torch.int32) * step
    numbers = torch.where(rows < 0, -1, rows * stride + offsets).to(torch.int32).flatten()
    ids = (
        None
        if selection.weight_ids is None
        else mark_rows(selection.weight_ids.repeat_interleave(streams), 2)
    )
    return Selection(mark_rows(numbers, tokens.batch * tokens.width * streams), ids)
