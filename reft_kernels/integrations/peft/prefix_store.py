"""A bounded store of states that training does not change, and the key-value cache made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class KeptRow(NamedTuple):
    """The states of one row, with n tokens of which the first c are the prefix.

    Attributes:
        keys: ``[layers, heads, c, head_dim]``, keys of the prefix in the layers that run; None if
            c is 0.
        values: the values, of the shape of ``keys`` but for ``head_dim``.
        hidden: ``[n - c, d]``, the hidden states after the layers that are skipped; None if none
            is.
    """

    keys: Tensor | None
    values: Tensor | None
    hidden: Tensor | None

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(t.numel() * t.element_size() for t in self if t is not None)


@dataclasses.dataclass
class PrefixStatistics:
    """What training steps found and computed.

    Attributes:
        found: rows whose states were kept.
        computed: rows whose states had to be computed.
        tokens: tokens of all these rows.
        tokens_run: those of them that ran through the layers above the skipped ones, with a graph.
        calls: calls that used kept states.
        plain_calls: training calls that did not, because of their arguments.
        bytes: size of the kept states.
        max_bytes: the limit of ``bytes``.
    """

    max_bytes: int
    found: int = 0
    computed: int = 0
    tokens: int = 0
    tokens_run: int = 0
    calls: int = 0
    plain_calls: int = 0
    bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the rows whose states were kept."""
        return self.found / max(self.found + self.computed, 1)

    def __str__(self) -> str:
        rows = self.found + self.computed
        text = (
            f"prefix states: {self.found} of {rows} rows found ({self.hit_rate:.0%}), "
            f"{self.tokens_run} of {self.tokens} tokens run in training forwards, "
            f"{self.bytes / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB"
        )
        if self.plain_calls:
            text += f"; {self.plain_calls} of {self.calls + self.plain_calls} calls ran without"
        return text


class PrefixStore:
    """Keeps rows until their size reaches a limit; rows are then no longer added.

    Nothing is replaced: an epoch reads each row once, so that whatever is kept serves one read an
    epoch, and replacing rows would only cost more.

    Args:
        max_bytes: the limit.
    """

    def __init__(self, max_bytes: int) -> None:
        self.statistics = PrefixStatistics(max_bytes)
        self._rows: dict[bytes, KeptRow] = {}

    def find(self, keys: Sequence[bytes]) -> list[KeptRow | None]:
        """The kept rows of a batch, None for those that are not kept."""
        rows = [self._rows.get(key) for key in keys]
        found = sum(row is not None for row in rows)
        self.statistics.found += found
        self.statistics.computed += len(rows) - found
        return rows

    def add(self, key: bytes, row: KeptRow) -> None:
        """Keep a row, if it fits."""
        size = row.bytes + len(key)
        if key not in self._rows and self.statistics.bytes + size <= self.statistics.max_bytes:
            self._rows[key] = row
            self.statistics.bytes += size

    def clear(self) -> None:
        """Drop all rows."""
        self._rows.clear()
        self.statistics.bytes = 0

    def close(self) -> None:
        """Drop all rows; the statistics keep their size."""
        self._rows.clear()


class PrefixLayer(DynamicLayer):
    """Keys and values of one layer's prefix; a forward's own follow them and are not stored.

    Args:
        keys: ``[B, heads, P, head_dim]``.
        values: of the same shape, but for ``head_dim``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and forward, in the dtype of the forward's (autocast)."""
        keys, values = self.keys.to(key_states), self.values.to(value_states)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


def prefix_cache(rows: Sequence[KeptRow], lengths: Sequence[int], skipped: int) -> Cache:
    """A key-value cache of the rows' prefixes, padded on the left to the longest one, P.

    Args:
        rows: the states of each row; one has a prefix.
        lengths: length of each prefix.
        skipped: number of layers that are skipped; they only need the length of the cache.
    """
    some = next(row for row in rows if row.keys is not None)
    width = max(lengths)
    padded = []
    for name in ("keys", "values"):
        like: Tensor = getattr(some, name)
        layers, heads, _, size = like.shape
        batch = like.new_zeros(layers, len(rows), heads, width, size)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if length:
                batch[:, number, :, width - length :] = getattr(row, name)
        padded.append(batch)
    keys, values = padded
    cache = DynamicCache()
    first = [PrefixLayer(keys[0], values[0])] * skipped
    cache.layers = first + [PrefixLayer(*pair) for pair in zip(keys, values, strict=True)]
    return cache


def padded_hidden(rows: Sequence[KeptRow]) -> Tensor | None:
    """The hidden states of the rows, padded on the right, ``[B, S, d]``; None without any."""
    hidden = [row.hidden for row in rows if row.hidden is not None]
    return torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True) if hidden else None
