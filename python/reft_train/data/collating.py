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


@dataclass(frozen=True)
class PaddingCollator:
    """Collate causal items: ``input_ids``, ``attention_mask``, and ``labels`` if present.

    Args:
        pad_id: padding value of ``input_ids``; labels are padded with -100.
        side: padding side: "right", or "left" for generation.
    """

    pad_id: int
    side: str = "right"

    def __call__(self, items: Items) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._padded(ids, self.pad_id),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
        }
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = self._padded([item["token_type_ids"] for item in items], 0)
        if "labels" in items[0]:
            batch["labels"] = self._labels([item["labels"] for item in items])
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        options = {"padding_value": value, "padding_side": self.side}
        return pad_sequence(tensors, batch_first=True, **options)

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        return self._padded(labels, IGNORED)


class ClassificationCollator(PaddingCollator):
    """Collate texts to classify, with labels ``[B]``: int64 classes or float32 targets."""

    def _labels(self, labels: Sequence[Any]) -> Tensor:
        numbers = any(isinstance(label, float) for label in labels)
        return torch.tensor(labels, dtype=torch.float32 if numbers else torch.int64)
