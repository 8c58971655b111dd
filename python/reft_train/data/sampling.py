"""The order of examples: a function of a seed and an epoch alone, so that a resumed run sees
what the first would have seen.
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
    """Indices 0 to ``count`` - 1 in random order, another one each epoch.

    Args:
        count: number of examples.
        seed: with the epoch, decides the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

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
    and the groups shuffled. What is left over, less than a group, is drawn at random and comes
    last.

    Args:
        lengths: tokens of each example.
        group: examples of one optimizer step: batch size x accumulation steps x processes. A step
            is then as random as a group, and its batches are of similar length on every process.
        seed: with the epoch, decides the order.
    """

    def __init__(self, lengths: Sequence[int], group: int, seed: int) -> None:
        if group < 1:
            raise ValueError(f"group: got {group}, expected at least 1")
        self.lengths = list(lengths)
        self.group = group
        super().__init__(len(self.lengths), seed)

    def __iter__(self) -> Iterator[int]:
        generator = self._generator()
        order = _shuffled(range(self.count), generator)
        whole = self.count - self.count % self.group
        groups = []
        for start in range(0, whole, self.group * _BUCKET):
            bucket = sorted(
                order[start : min(start + self.group * _BUCKET, whole)],
                key=self.lengths.__getitem__,
            )
            groups += [bucket[i : i + self.group] for i in range(0, len(bucket), self.group)]
        rest = sorted(order[whole:], key=self.lengths.__getitem__)
        return iter([index for group in [*_shuffled(groups, generator), rest] for index in group])


def _shuffled(values: Sequence[Any], generator: torch.Generator) -> list[Any]:
    return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]
