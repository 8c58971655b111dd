"""The order of examples: a function of seed and epoch alone, so that a resumed run sees the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

_BUCKET = 16  # groups sorted by length together: little padding, and still a random order


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of 63 bits for one epoch; neighbouring seeds and epochs share none."""
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big") >> 1


class ShuffledSampler(Sampler[int]):
    """Indices 0 to ``count`` - 1 in random order, another one each epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of; transformers' Trainer and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(_shuffled(range(self.count), self._generator()))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))


class GroupedSampler(ShuffledSampler):
    """Indices in random order, examples of similar length next to each other.

    Shuffled indices are sorted by length in buckets of sixteen groups, the buckets cut into groups,
    and the groups shuffled. What is left over, less than a group, comes last.

    Args:
        lengths: tokens of each example.
        group: examples of one optimizer step over all processes, whose batches are then alike.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        if group < 1:
            raise ValueError(f"group: got {group}, expected at least 1")
        super().__init__(len(lengths), seed)
        self.lengths, self.group = list(lengths), group

    def __iter__(self) -> Iterator[int]:
        generator, length = self._generator(), self.lengths.__getitem__
        order = _shuffled(range(self.count), generator)
        whole = self.count - self.count % self.group
        groups = []
        for start in range(0, whole, self.group * _BUCKET):
            bucket = sorted(order[start : min(start + self.group * _BUCKET, whole)], key=length)
            groups += [bucket[i : i + self.group] for i in range(0, len(bucket), self.group)]
        rest = sorted(order[whole:], key=length)
        return iter([index for group in [*_shuffled(groups, generator), rest] for index in group])


def _shuffled(values: Sequence[Any], generator: torch.Generator) -> list[Any]:
    return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]
