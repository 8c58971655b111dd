"""Computes the rows that an adapter edits in a window, for any layout of the hidden state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels import positions
from reft_kernels.checks import describe, mark_rows
from reft_kernels.model.explicit_arguments import repeat_examples
from reft_kernels.model.modalities import CountedTokens
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.prompts import window_of_shape
from reft_kernels.model.response_rule import Template
from reft_kernels.model.window import Packed, Window
from reft_kernels.positions import Spec


class PositionRule(NamedTuple):
    """The positions that an adapter edits.

    Attributes:
        spec: the parsed positions.
        untied: whether first and last positions have separate weights.
        template: token ids that end a prompt; see :mod:`reft_kernels.model.response_rule`.
        counted: the tokens among which the positions are counted; None for all.
    """

    spec: Spec
    untied: bool = False
    template: Template | None = None
    counted: CountedTokens | None = None


class Selection(NamedTuple):
    """The rows to edit.

    Attributes:
        rows: int32 ``[N]``, rows of ``hidden.view(-1, d)``, -1 is skipped; None: all rows.
        weight_ids: int32 ``[N]``, weight set of each row; None if there is one set.
        coeff: fp32 ``[N, r]``, coefficients of each row; None for 1.
        strengths: fp32 ``[E]``, of RED: factors of the edit, each with its weight sets; or None.
    """

    rows: Tensor | None
    weight_ids: Tensor | None
    coeff: Tensor | None = None
    strengths: Tensor | None = None


def select(window: Window, rule: PositionRule) -> Selection | None:
    """The rows that ``rule`` selects in a window.

    Args:
        window: the part of the batch that the forward processes.
        rule: the positions to edit.

    Returns:
        None if no row can be selected, as in a decode step.

    Raises:
        ValueError: explicit arguments do not fit the batch, or the rule counts tokens of one
            modality and the token ids are not known.
    """
    if window.call.edit_positions is not None:
        return _from_positions(window, rule.untied)
    spec = rule.spec
    if spec.kind == "all" and not rule.untied:
        rows = _real_rows(window) if rule.counted is None else _rows_of(window, rule.counted)
        return Selection(rows, None)
    if window.packed is not None:
        return _from_packed(window, window.packed, rule)
    if rule.counted is not None:
        return _from_counted(window, rule, rule.counted)
    lengths = window.prompt_lengths(rule.template)
    if lengths is None or window.starts is None:
        return None
    rows = positions.prompt_rows(
        spec, window.starts, lengths, window.width, token_mask=window.tokens, offset=window.offset
    )
    return Selection(
        rows,
        positions.weight_ids(spec, window.batch, device=window.device) if rule.untied else None,
    )


def _real_rows(window: Window) -> Tensor | None:
    """Rows of real tokens; None: all rows."""
    tokens = window.tokens
    if tokens is None or window.lengths is None:
        return None
    # on an accelerator, assume that the mask hides tokens: checking would synchronize
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(tokens.all()):
        return None
    return positions.from_mask(tokens)


def _rows_of(window: Window, counted: CountedTokens) -> Tensor:
    """Rows of the real tokens of one modality."""
    if window.ids is None:
        raise counted.unknown
    mask = counted.mask(window.ids)
    return positions.from_mask(mask if window.tokens is None else mask & window.tokens)


def _from_counted(window: Window, rule: PositionRule, counted: CountedTokens) -> Selection | None:
    """Rows of a rule that counts the tokens of one modality in each prompt."""
    lengths = window.prompt_lengths(rule.template)
    if lengths is None or window.starts is None:
        return None
    ids = window.prompt_ids()
    if ids is None:
        raise counted.unknown
    spec, device = rule.spec, window.device
    columns, starts = torch.arange(ids.shape[1], device=device), window.starts.unsqueeze(1)
    prompt = (columns >= starts) & (columns < starts + lengths.unsqueeze(1)) & counted.mask(ids)
    if spec.kind == "prompt":
        chosen = torch.where(prompt, columns, -1)
    else:
        place = prompt.cumsum(1) - 1
        ends = _Ends.of(spec, place, prompt.sum(1, keepdim=True))
        # the entries of an example are those of its first tokens, then those of its last ones;
        # tokens that are not selected share one more
        entry = torch.where(ends.first, place, spec.first + place - ends.last_begins)
        count = spec.first + spec.last
        entry = torch.where(prompt & (ends.first | ends.last), entry, count)
        chosen = torch.full((window.batch, count + 1), -1, device=device)
        chosen = chosen.scatter(1, entry, columns.expand_as(entry))[:, :count]
    here = chosen - window.offset
    base = torch.arange(window.batch, device=device).unsqueeze(1) * window.width
    seen = (chosen >= 0) & (here >= 0) & (here < window.width)
    rows = torch.where(seen, here + base, -1).to(torch.int32).flatten()
    weight_ids = positions.weight_ids(spec, window.batch, device=device) if rule.untied else None
    return Selection(mark_rows(rows, window.batch * window.width), weight_ids)


class _Ends(NamedTuple):
    """Which counted tokens are among the first and the last of their prompt.

    Attributes:
        first: whether a token is one of the first.
        last: whether a token is one of the last.
        last_begins: index of the first of the last tokens.
    """

    first: Tensor
    last: Tensor
    last_begins: Tensor

    @classmethod
    def of(cls, spec: Spec, place: Tensor, length: Tensor) -> _Ends:
        """The ends of prompts with ``length`` counted tokens; ``place`` is the index of each."""
        available = length // 2 if spec.halves else length
        last_begins = length - available.clamp(max=spec.last)
        return cls(place < available.clamp(max=spec.first), place >= last_begins, last_begins)


def _from_positions(window: Window, untied: bool) -> Selection | None:
    """Rows of the explicit argument ``edit_positions``."""
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
        positions.from_indices(chosen, limit)  # raises for columns out of range or repeated
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


def _from_packed(window: Window, packed: Packed, rule: PositionRule) -> Selection:
    """Rows of a packed batch: one entry per token, -1 for tokens that are not edited."""
    spec, device = rule.spec, window.device
    prompt, place = window.packed_prompt(rule.template), packed.place
    count = place.shape[0]
    index = torch.arange(count, device=device)
    if rule.counted is not None:
        if window.ids is None:
            raise rule.counted.unknown
        prompt = prompt & rule.counted.mask(window.ids).reshape(-1)
        running = prompt.to(torch.int64).cumsum(0)
        before = (running - prompt.to(torch.int64))[index - place]  # of the sequence's first token
        place = running - 1 - before
    length = torch.zeros(count, dtype=torch.int64, device=device)
    length = length.index_add_(0, packed.sequence, prompt.to(torch.int64))[packed.sequence]
    last = torch.zeros_like(prompt)
    if spec.kind == "ends":
        length = (length - 1).clamp(min=0) if spec.pyreft else length
        prompt = prompt & (place < length)
        ends = _Ends.of(spec, place, length)
        last = prompt & ends.last
        prompt = (prompt & ends.first) | last
    rows = torch.where(prompt, index, -1).to(torch.int32)
    ids = last.to(torch.int32) if rule.untied else None
    if device.type == "cpu" and not torch.compiler.is_compiling():
        rows, ids = rows[prompt], None if ids is None else ids[prompt]
    return Selection(mark_rows(rows, count), None if ids is None else mark_rows(ids, 2))


# ---- hidden states whose rows are not tokens


class DeferredSelection:
    """A selection that depends on the hidden state's shape, as for images and audio frames.

    All rows of ``[B, T, d]`` are prompt, unless the call has explicit arguments and no tokens.

    Args:
        rule: the positions to edit.
        call: arguments of the model's call.
        frame_mask: see :func:`~reft_kernels.model.prompts.window_of_shape`.
        scaled: adds the coefficients of the call to a selection of a window, or None.
    """

    def __init__(
        self,
        rule: PositionRule,
        call: ModelCall,
        frame_mask: Any = None,
        scaled: Callable[[Selection, Window], Selection] | None = None,
    ) -> None:
        self.rule = rule
        self.call = call
        self.frame_mask = frame_mask
        self.scaled = scaled
        self._selections: dict[tuple, Selection | None] = {}

    def select(self, hidden: Tensor) -> Selection | None:
        """The rows of ``hidden``, ``[B, T, d]`` or ``[N, d]``; None if there are none."""
        key = (hidden.shape[:-1], hidden.device)
        if key not in self._selections:
            self._selections[key] = self._select(hidden)
        return self._selections[key]

    def _select(self, hidden: Tensor) -> Selection | None:
        window = window_of_shape(hidden.shape, hidden.device, self.call, self.frame_mask)
        selection = select(window, self.rule)
        if selection is None or self.scaled is None:
            return selection
        return self.scaled(selection, window)


# ---- layouts


class TokenShape(NamedTuple):
    """Shape ``(B, T)`` of the tokens that rows refer to."""

    batch: int
    width: int


def place_rows(
    selection: Selection, tokens: TokenShape, hidden: Tensor, layout: str
) -> Selection | None:
    """Convert rows of tokens ``[B, T]`` to rows of a hidden state of another layout.

    Compares sizes on the host only. Layouts:

        "btd"          ``[B, T, d]`` or flattened ``[B * T, d]``
        "btd_padded"   ``[B, T', d]`` with T' >= T: the model pads the sequence on the right
        "tbd"          ``[T, B, d]``
        "btsd"         ``[B, T, S, d]``: all S streams of a token are edited
        "sbtd"         ``[S, B, T, d]``

    Args:
        selection: the rows to convert.
        tokens: the shape that the rows refer to.
        hidden: the hidden state.
        layout: its layout.

    Returns:
        None if the shape of ``hidden`` does not fit.
    """
    batch, width = tokens
    lead = tuple(hidden.shape[:-1])
    if layout in ("btd", "btd_padded") and lead in ((batch, width), (batch * width,)):
        return selection
    if layout == "btd_padded" and len(lead) == 2 and lead[0] == batch and lead[1] > width:
        rows = selection.rows
        if rows is None:
            rows = torch.arange(batch * width, device=hidden.device, dtype=torch.int32)
        moved = (rows // width) * lead[1] + rows % width
        return _renumbered(selection, rows, moved, batch * lead[1])
    if selection.rows is None and (selection.coeff is not None or selection.weight_ids is not None):
        rows = torch.arange(batch * width, device=hidden.device, dtype=torch.int32)
        selection = selection._replace(rows=mark_rows(rows, batch * width))
    if layout == "tbd" and lead == (width, batch):
        rows = selection.rows
        if rows is None:
            return selection
        moved = (rows % width) * batch + rows // width
        return _renumbered(selection, rows, moved, batch * width)
    if layout == "btsd" and len(lead) == 3 and lead[:2] == (batch, width):
        return _streams(selection, tokens, lead[2], 1, lead[2])
    if layout == "sbtd" and len(lead) == 3 and lead[1:] == (batch, width):
        return _streams(selection, tokens, lead[0], batch * width, 1)
    return None


def _renumbered(selection: Selection, rows: Tensor, moved: Tensor, count: int) -> Selection:
    """A selection with row numbers ``moved`` below ``count``; skipped ``rows`` stay -1."""
    numbers = torch.where(rows < 0, -1, moved).to(torch.int32)
    return selection._replace(rows=mark_rows(numbers, count))


def _streams(
    selection: Selection, tokens: TokenShape, streams: int, step: int, stride: int
) -> Selection:
    """Select all streams of each row; row n of stream s is ``n * stride + s * step``."""
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
    coeff = None if selection.coeff is None else selection.coeff.repeat_interleave(streams, dim=0)
    rows = mark_rows(numbers, tokens.batch * tokens.width * streams)
    return Selection(rows, ids, coeff, selection.strengths)
