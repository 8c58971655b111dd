"""Streaming of rows that are read, tokenized and shuffled on demand, for large files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.data.reading import existing_file, iter_rows
from reft_train.data.tokenizing import iter_items
from reft_train.errors import wrong
from reft_train.tasks.base import Task

if TYPE_CHECKING:
    import datasets


def streamed(
    path: Path,
    task: Task,
    tokenizer: Any,
    kind: str,
    max_length: int,
    *,
    seed: int = 0,
    buffer: int = 1000,
    workers: int = 0,
    all_turns: bool = False,
) -> datasets.IterableDataset:
    """Return an endless data set of a file's usable items, shuffled with a buffer by ``datasets``.

    The order is a function of the seed. Each of ``workers`` data loader workers reads its share of
    the rows; accelerate distributes items to processes.

    Args:
        path: .jsonl, .csv, .tsv or .parquet, read row by row; .json is read completely.
        task, tokenizer, kind, max_length: see :func:`reft_train.data.tokenizing.tokenize_rows`.
        buffer: size of the shuffle buffer in items.
        all_turns: yield an item for each answer of a conversation instead of only the last.
    """
    path, count = existing_file(path, "--train"), max(1, workers)

    def items(shares: list[int]) -> Iterator[dict[str, Any]]:
        for _ in itertools.count():
            usable = False
            rows = iter_rows(path)
            rows = (
                part for row in rows for part in (task.training_rows(row) if all_turns else [row])
            )
            rows = (row for number, row in enumerate(rows) if number % count in shares)
            for item in iter_items(rows, task, tokenizer, kind, max_length):
                if not item.lost:
                    usable = True
                    yield item.columns()
            if not usable:  # another pass would find no usable rows either
                expected = f"rows whose prompt and answer fit within max_length {max_length}"
                raise wrong("--train", f"{path} without a usable row", expected)

    import datasets  # absent where only the GPU tests run

    # datasets gives each worker one of the values of a list
    shares = {"shares": list(range(count))}
    stream = datasets.IterableDataset.from_generator(items, gen_kwargs=shares)
    return stream.shuffle(seed=seed, buffer_size=buffer)
