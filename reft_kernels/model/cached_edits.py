"""Records which columns of a key-value cache were edited, and compares them with a prompt's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.model.selection import PositionRule, select
from reft_kernels.model.window import Window

_EDITS = "_reft_edits"
_STALE_CACHE = (
    "ReFT: past_key_values holds {past} columns whose edits by adapter {name!r} are not those of "
    "this prompt (columns {columns} of example {example} differ), so the output differs from "
    "generating without the cache. Fill the cache with prompt_lengths=[...] of the whole prompt, "
    "or generate without it"
)


class CachedEdit(NamedTuple):
    """The rows that one forward edited for one adapter.

    Attributes:
        adapter: name of the adapter.
        offset: first column of the forward.
        batch: batch size B.
        width: number of columns of the forward.
        rows: int32 ``[N]``, rows of ``[B * width]``, -1 is skipped; None means all.
        members: bool ``[B]``, the examples that use the adapter; None means all.
    """

    adapter: str
    offset: int
    batch: int
    width: int
    rows: Tensor | None
    members: Tensor | None = None

    def is_followed_by(self, other: CachedEdit) -> bool:
        """Whether both edit all rows of the same examples, and ``other`` starts where this ends.

        This is the case for decoding steps with positions "all".
        """
        return (
            self.rows is None
            and other.rows is None
            and self.members is other.members
            and self.batch == other.batch
            and self.offset + self.width == other.offset
        )

    def columns(self, total: int) -> Tensor:
        """Mask of the edited columns, bool ``[B, total]``."""
        device = None if self.rows is None else self.rows.device
        edited = torch.zeros(self.batch, total, dtype=torch.bool, device=device)
        here = edited[:, self.offset : self.offset + self.width]
        if self.rows is None:
            here[:] = True
        else:
            chosen = self.rows[self.rows >= 0].long()
            example, column = chosen // self.width, chosen % self.width
            keep = column < here.shape[1]
            here[example[keep], column[keep]] = True
        return edited if self.members is None else edited & self.members.to(edited.device)[:, None]


def record_edits(cache: Any, edits: Sequence[CachedEdit]) -> None:
    """Store the edits of a forward on the cache that it filled, as an attribute.

    Copies of the cache keep it. Tuples, lists and dicts have no attributes and are skipped.
    """
    if cache is None or isinstance(cache, tuple | list | dict):
        return
    # a cache that was reset or cropped is filled again: drop the edits of overwritten columns
    kept = [e for e in getattr(cache, _EDITS, ()) if all(e.offset < new.offset for new in edits)]
    for new in edits:
        last = next(
            (i for i in range(len(kept) - 1, -1, -1) if kept[i].adapter == new.adapter), None
        )
        if last is not None and kept[last].is_followed_by(new):
            kept[last] = kept[last]._replace(width=kept[last].width + new.width)
        else:
            kept.append(new)
    setattr(cache, _EDITS, tuple(kept))


def edited_columns(
    cache: Any, adapter: str, batch: int, past: int, device: torch.device
) -> Tensor | None:
    """Mask of the cached columns that ``adapter`` edited.

    Args:
        cache: the cache, with the edits of :func:`record_edits`.
        adapter: name of the adapter.
        batch: batch size B; a multiple of the recorded batch size is repeated, as for beams.
        past: number of cached columns.
        device: device of the result.

    Returns:
        Bool ``[B, past]``, or None if the batch size no longer matches the recorded one.
    """
    edited = torch.zeros(batch, past, dtype=torch.bool, device=device)
    for edit in getattr(cache, _EDITS, ()):
        if edit.adapter != adapter or edit.offset >= past:
            continue
        if batch % edit.batch:
            return None
        edited |= edit.columns(past).to(device).repeat_interleave(batch // edit.batch, dim=0)
    return edited


def starts_from_cache(window: Window | None, cache: Any) -> bool:
    """Whether this is the first call of a generation that continues a filled cache."""
    if (
        window is None
        or window.generation is None
        or not window.generation.is_first
        or torch.compiler.is_compiling()
    ):
        return False
    window.generation.is_first = False
    return cache is not None and isinstance(window.offset, int) and window.offset > 0


def warn_if_edited_otherwise(
    cache: Any, adapter: str, rule: PositionRule, window: Window, members: Tensor | None
) -> None:
    """Warn if the cached columns were edited at other positions than this prompt's.

    Args:
        cache: the cache, with the edits of :func:`record_edits`.
        adapter: name of the adapter.
        rule: the positions that it edits.
        window: the window of a call for which :func:`starts_from_cache` holds.
        members: bool ``[B]``, the examples that use the adapter; None means all.
    """
    past = window.offset
    assert isinstance(past, int)  # starts_from_cache
    edited = edited_columns(cache, adapter, window.batch, past, window.device)
    if window.lengths is None or edited is None:
        return
    cached = Window(
        window.batch,
        past,
        window.device,
        offset=0,
        total=window.total,
        starts=window.starts,
        lengths=window.lengths,
        source=window.source,
        tokens=None if window.whole is None else window.whole[:, :past],
        whole=window.whole,
        text=window.text,
        call=window.call,
        generation=window.generation,
    )
    selection = select(cached, rule)
    rows = None if selection is None else selection.rows
    expected = CachedEdit(adapter, 0, window.batch, past, rows, members).columns(past)
    expected = expected.to(window.device)
    if window.whole is not None:
        expected = expected & window.whole[:, :past]
    differ = expected != edited
    if bool(differ.any()):
        example = int(differ.any(dim=1).to(torch.int8).argmax())
        columns = differ[example].nonzero().flatten().tolist()
        text = ", ".join(map(str, columns[:8])) + (", ..." if len(columns) > 8 else "")
        warnings.warn(
            _STALE_CACHE.format(past=past, name=adapter, columns=text, example=example),
            stacklevel=3,
        )
