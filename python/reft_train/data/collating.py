"""Collators that pad items of different lengths into int64 batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from reft_train.data.tokenizing import IGNORED

Items = Sequence[Mapping[str, Any]]


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """Pad ``rows`` with ``value`` to int64 ``[B, T]``, where T is the length of the longest row."""
    tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


@dataclass(frozen=True)
class PaddingCollator:
    """Collate causal items: ``input_ids``, ``attention_mask``, and ``labels`` if present.

    Args:
        pad_id: padding value of ``input_ids``; labels are padded with -100.
        side: padding side: "right", or "left" for generation.
    """

    pad_id: int
    side: str = "right"

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side: got {self.side!r}, expected 'left' or 'right'")

    def __call__(self, items: Items) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        mask = [[1] * len(row) for row in ids]
        batch = {
            "input_ids": pad(ids, self.pad_id, self.side),
            "attention_mask": pad(mask, 0, self.side),
        }
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = pad([item["token_type_ids"] for item in items], 0, self.side)
        if "labels" in items[0]:
            batch["labels"] = self._labels([item["labels"] for item in items])
        return batch

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        return pad(labels, IGNORED, self.side)


class Seq2SeqCollator(PaddingCollator):
    """Collate encoder-decoder items; labels are padded separately, on the right."""

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        return pad(labels, IGNORED)


class ClassificationCollator(PaddingCollator):
    """Collate texts to classify, with labels ``[B]``: int64 classes or float32 targets."""

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        numbers = any(isinstance(label, float) for label in labels)
        return torch.tensor(labels, dtype=torch.float32 if numbers else torch.int64)
