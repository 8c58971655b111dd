"""Token batches whose order depends on a seed and an epoch alone, so that every variant sees the
same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reft_train.demo.datasets import Example

BUCKET = 8  # batches sorted by length together: little padding, and still a random order


class Batch(NamedTuple):
    """``input_ids`` and ``attention_mask`` are int64 ``[B, T]``, padded on the right; ``labels``
    int64 ``[B]``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Encoded:
    """Tokenized examples: token ids, class numbers, and the id that pads."""

    input_ids: list[list[int]]
    classes: list[int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.classes)

    def collate(self, indices: list[int]) -> Batch:
        """The examples of ``indices`` as one batch, as wide as the longest."""
        width = max(len(self.input_ids[i]) for i in indices)
        ids = torch.full((len(indices), width), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(indices):
            tokens = self.input_ids[index]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        return Batch(ids, mask, torch.tensor([self.classes[i] for i in indices], dtype=torch.int64))

    def by_length(self, batch_size: int) -> list[list[int]]:
        """Indices in batches of similar length, for evaluation."""
        order = sorted(range(len(self)), key=lambda i: (len(self.input_ids[i]), i))
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def shuffled(self, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
        """Indices of one epoch's batches, a function of the arguments alone."""
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), batch_size * BUCKET):
            bucket = sorted(
                order[start : start + batch_size * BUCKET], key=lambda i: len(self.input_ids[i])
            )
            batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def encode(tokenizer, examples: list[Example], labels: list[str], max_length: int) -> Encoded:
    """Tokenize examples, cut to ``max_length`` tokens, special ones included."""
    number = {label: i for i, label in enumerate(labels)}
    ids = tokenizer([e.text for e in examples], truncation=True, max_length=max_length)["input_ids"]
    pad_id = tokenizer.pad_token_id
    return Encoded(
        [list(row) for row in ids],
        [number[e.label] for e in examples],
        0 if pad_id is None else pad_id,
    )
