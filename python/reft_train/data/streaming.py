"""Streaming of rows that are read, tokenized and shuffled on demand, for large files."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from reft_train.data.reading import existing_file, iter_rows
from reft_train.data.sampling import epoch_seed
from reft_train.data.tokenizing import iter_items
from reft_train.errors import UserError

if TYPE_CHECKING:
    from reft_train.tasks.base import Row, Task

T = TypeVar("T")


def shuffled(values: Iterable[T], buffer: int, generator: random.Random) -> Iterator[T]:
    """Shuffle ``values`` with a buffer of about ``buffer`` values."""
    held: list[T] = []
    for value in values:
        if len(held) < buffer:
            held.append(value)
        else:
            place = generator.randrange(buffer)
            held[place], value = value, held[place]
            yield value
    generator.shuffle(held)
    yield from held


class StreamingRows(IterableDataset):
    """Iterable data set of a file's usable items, ordered by seed and epoch.

    Each data loader worker reads its share of the rows; accelerate distributes items to processes.

    Args:
        path: .jsonl, .csv, .tsv or .parquet, read row by row; .json is read completely.
        task, tokenizer, kind, max_length: see :func:`reft_train.data.tokenizing.tokenize_rows`.
        buffer: size of the shuffle buffer; 1 keeps the file's order.
        name: argument name for errors about the file.
        endless: restart at the end, with a different order in each pass.
        all_turns: yield an item for each answer of a conversation instead of only the last.
    """

    def __init__(
        self,
        path: Path,
        task: Task,
        tokenizer: Any,
        kind: str,
        max_length: int,
        *,
        seed: int = 0,
        buffer: int = 10_000,
        name: str = "--train",
        endless: bool = False,
        all_turns: bool = False,
    ) -> None:
        if buffer < 1:
            raise UserError(f"buffer: got {buffer}, expected at least 1")
        self.path, self.name = existing_file(path, name), name
        self.task, self.tokenizer, self.kind, self.max_length = task, tokenizer, kind, max_length
        self.seed, self.buffer, self.endless, self.all_turns = seed, buffer, endless, all_turns
        self._epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # shared with persistent workers

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; called by accelerate and transformers' Trainer."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first = int(self._epoch)
        for epoch in itertools.count(first) if self.endless else (first,):
            yield from self._pass(epoch)

    def _pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        worker, usable = get_worker_info(), 0
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        rows = shuffled(self._rows(), self.buffer, random.Random(epoch_seed(self.seed, epoch)))
        rows = itertools.islice(rows, index, None, workers)
        for item in iter_items(rows, self.task, self.tokenizer, self.kind, self.max_length):
            if item.lost:
                continue
            usable += 1
            types = {} if item.token_type_ids is None else {"token_type_ids": item.token_type_ids}
            yield {"input_ids": item.input_ids, "labels": item.labels, **types}
        if self.endless and not usable:  # another pass would find no usable rows either
            share = f" in the share of worker {index} of {workers}" if workers > 1 else ""
            raise UserError(
                f"{self.name}: got {self.path} without a usable row{share}, expected rows that "
                "keep a "
                f"prompt and an answer within max_length {self.max_length}"
            )

    def _rows(self) -> Iterator[Row]:
        for row in iter_rows(self.path, self.name):
            yield from self.task.training_rows(row) if self.all_turns else [row]
