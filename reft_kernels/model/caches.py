"""Reads the length of a key-value cache and records which of its columns were edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "state", "mems")
_EDITS = "_reft_edits"


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or None."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def is_paged(arguments: Mapping[str, Any]) -> bool:
    """Whether a call is a step of continuous batching, with tokens of several requests."""
    return type(arguments.get("cache")).__name__ == "PagedAttentionCache"


def cached_columns(cache: Any, arguments: Mapping[str, Any]) -> int | Tensor | None:
    """Number of sequence columns in a cache.

    Args:
        cache: a transformers cache, a tuple of (key, value) pairs or of recurrent states.
        arguments: the arguments of the backbone's call, by name.

    Returns:
        A Python int, or an integer tensor if the cache counts on its device. None if the cache
        has recurrent or state-space states, whose length is unknown.
    """
    if isinstance(cache, tuple | list):
        first = cache[0] if cache else None
        return (
            first[0].shape[-2]
            if isinstance(first, tuple | list) and isinstance(first[0], Tensor)
            else None
        )
    if torch.compiler.is_compiling():
        return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    for holder in layers if layers else (cache,):  # the first layers of a hybrid may be stateful
        count = _sequence_length(holder)
        if isinstance(count, Tensor) or count:
            return count
    if _holds_states(cache) or any(_holds_states(layer) for layer in layers or ()):
        return None
    position = arguments.get("cache_position")
    if (
        not layers
        and not hasattr(cache, "get_seq_length")
        and isinstance(position, Tensor)
        and position.numel()
    ):
        return int(position[0])
    return 0


def _sequence_length(holder: Any) -> int | Tensor:
    count = getattr(holder, "get_seq_length", None)
    if count is None:
        return 0
    try:
        return count()
    except ValueError:  # transformers raises it for a cache of state-space layers only
        return 0


def _holds_states(holder: Any) -> bool:
    """Whether a state-space model's part of a cache has been written."""
    state = getattr(holder, "has_previous_state", False)
    if isinstance(state, dict):
        state = any(state.values())
    elif callable(state):
        state = False  # a method of the whole cache; cached_columns checks each layer
    return bool(state) or bool(getattr(holder, "linear_cache", None))


# ---- edited columns


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
