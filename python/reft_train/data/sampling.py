"""Order of examples as a function of seed and epoch, so that a resumed run repeats it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

_BUCKET = 16  # groups sorted together by length: limits padding and keeps the order random


def epoch_seed(seed: int, epoch: int) -> int:
    """Derive a 63-bit seed for an epoch, distinct for neighbouring seeds and epochs."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big") >> 1


class ShuffledSampler(Sampler[int]):
    """Sample indices 0 to ``count`` - 1 in a random order that changes each epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; called by transformers' Trainer and accelerate."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(_shuffled(range(self.count), self._generator()))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))


class GroupedSampler(ShuffledSampler):
    """Sample indices in random order with examples of similar length next to each other.

    Shuffled indices are sorted by length within buckets of sixteen groups; the buckets are cut into
    groups, and the groups are shuffled. An incomplete group comes last. (Trainer's own sampler
    orders all groups of a bucket by length, and its order cannot be resumed exactly.)

    Args:
        lengths: tokens of each example.
        group: examples of one optimizer step over all processes; they have similar lengths.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        super().__init__(len(lengths), seed)
        self.lengths, self.group = list(lengths), group

    def __iter__(self) -> Iterator[int]:
        generator, length, size = self._generator(), self.lengths.__getitem__, self.group
        order = _shuffled(range(self.count), generator)
        grouped = self.count - self.count % size
        groups = []
        for start in range(0, grouped, size * _BUCKET):
            bucket = sorted(order[start : min(start + size * _BUCKET, grouped)], key=length)
            groups += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        rest = sorted(order[grouped:], key=length)
        return iter([index for group in [*_shuffled(groups, generator), rest] for index in group])


def _shuffled(values: Sequence[Any], generator: torch.Generator) -> list[Any]:
    return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]
