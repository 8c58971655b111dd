"""Items of different lengths as one batch of int64 tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reft_train.data.tokenizing import IGNORED

Items = Sequence[Mapping[str, Any]]


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> Tensor:
    """``rows`` as int64 ``[B, T]``, shorter ones filled with ``value``; T is the longest."""
    width = max(len(row) for row in rows)
    filled = torch.full((len(rows), width), value, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        filled[number, place] = torch.as_tensor(row, dtype=torch.int64)
    return filled


@dataclass(frozen=True)
class PaddingCollator:
    """Causal items: ``input_ids``, ``attention_mask``, and ``labels`` where items have them
    (prompts to continue have none).

    Args:
        pad_id: fills ``input_ids``; labels are filled with -100.
        side: "right", or "left" to generate.
    """

    pad_id: int
    side: str = "right"

    def __post_init__(self) -> None:
        if self.side not in ("left", "right"):
            raise ValueError(f"side: got {self.side!r}, expected 'left' or 'right'")

    def __call__(self, items: Items) -> dict[str, Tensor]:
        batch = self._inputs(items)
        if "labels" in items[0]:
            batch["labels"] = pad([item["labels"] for item in items], IGNORED, self.side)
        return batch

    def _inputs(self, items: Items) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": pad(ids, self.pad_id, self.side),
            "attention_mask": pad([[1] * len(row) for row in ids], 0, self.side),
        }
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = pad([item["token_type_ids"] for item in items], 0, self.side)
        return batch


@dataclass(frozen=True)
class Seq2SeqCollator(PaddingCollator):
    """Encoder-decoder items: as :class:`PaddingCollator`, with labels padded apart, on the
    right.
    """

    def __call__(self, items: Items) -> dict[str, Tensor]:
        batch = self._inputs(items)
        if "labels" in items[0]:
            batch["labels"] = pad([item["labels"] for item in items], IGNORED, "right")
        return batch


@dataclass(frozen=True)
class ClassificationCollator(PaddingCollator):
    """Texts to classify: as :class:`PaddingCollator`, labels ``[B]``: int64 class numbers, or
    float32 numbers to predict.
    """

    def __call__(self, items: Items) -> dict[str, Tensor]:
        batch = self._inputs(items)
        if "labels" in items[0]:
            labels = [item["labels"] for item in items]
            dtype = (
                torch.float32 if any(isinstance(label, float) for label in labels) else torch.int64
            )
            batch["labels"] = torch.tensor(labels, dtype=dtype)
        return batch
