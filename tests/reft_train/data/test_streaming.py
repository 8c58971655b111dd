"""Streams of rows: complete, shared out without overlap, repeatable, and never held in memory
whole.
"""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from reft_train.data import streaming
from reft_train.data.streaming import StreamingRows, shuffled
from reft_train.data.tokenizing import tokenize_rows
from reft_train.errors import UserError
from reft_train.tasks.base import Example, Row, Task
from torch.utils.data import DataLoader

from tests.reft_train.tiny import tokenizer_of

COUNT = 50
TOKENIZER = tokenizer_of("llama")


class _Count(Task):
    name, recipe = "count", "none"

    def example(self, row, tokenizer=None):
        return Example("what is the answer", f" {row.fields['number']}", "")


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"number": n}) + "\n" for n in range(COUNT)))
    return file


def _stream(path, **settings):
    return StreamingRows(path, _Count(), TOKENIZER, "causal", 32, **({"buffer": 8} | settings))


def _number(item):
    return int(TOKENIZER.decode([label for label in item["labels"] if label != -100][:-1]))


def _numbers(stream):
    return [_number(item) for item in stream]


def _loader(stream, **settings):
    return DataLoader(stream, batch_size=4, collate_fn=_numbers, **settings)


def test_items_are_those_of_the_tokenized_data_set(path):
    rows = [Row({"number": n}, "") for n in range(COUNT)]
    dataset = tokenize_rows(rows, _Count(), TOKENIZER, "causal", 32).select_columns(
        ["input_ids", "labels"]
    )
    assert list(_stream(path, buffer=1)) == list(dataset)


def test_every_row_comes_once_in_another_order(path):
    numbers = _numbers(_stream(path))
    assert sorted(numbers) == list(range(COUNT)) != numbers


def test_an_epoch_is_a_function_of_seed_and_number(path):
    orders = {}
    for seed, epoch in itertools.product(range(2), range(2)):
        for _ in range(2):
            stream = _stream(path, seed=seed)
            list(stream)  # what was read before does not matter
            stream.set_epoch(epoch)
            orders.setdefault((seed, epoch), set()).add(tuple(_numbers(stream)))
    assert [len(order) for order in orders.values()] == [1] * 4
    assert len(set.union(*orders.values())) == 4


@pytest.mark.parametrize("buffer", [1, 8, 1000])
def test_a_buffer_holds_no_more_than_its_size(buffer):
    read: list[int] = []
    values = (read.append(number) or number for number in range(COUNT))
    for given, _ in enumerate(shuffled(values, buffer, random.Random(0))):
        assert len(read) - given <= buffer + 1


def test_a_file_of_any_size_can_be_begun(path, monkeypatch):
    monkeypatch.setattr(
        streaming,
        "iter_rows",
        lambda path, name: (Row({"number": n}, "") for n in itertools.count()),
    )
    assert len([item for item, _ in zip(_stream(path), range(3), strict=False)]) == 3


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_the_rows_and_hear_of_epochs(path, persistent):
    stream = _stream(path)
    loader = _loader(
        stream, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork"
    )
    epochs = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        epochs.append(list(itertools.chain(*loader)))
    assert [sorted(numbers) for numbers in epochs] == [list(range(COUNT))] * 2
    assert epochs[0] != epochs[1]


def _prepared(stream, processes, index):
    return prepare_data_loader(
        _loader(stream),
        torch.device("cpu"),
        processes,
        index,
        put_on_device=False,
        dispatch_batches=False,
    )


@pytest.mark.parametrize("processes, index", [(1, 0), (2, 0), (2, 1)])
def test_accelerate_shares_the_rows_and_resumes_where_it_stopped(path, processes, index):
    def epoch_of(epoch, skipped=0):
        stream = _stream(path)
        loader = skip_first_batches(_prepared(stream, processes, index), skipped)
        stream.set_epoch(epoch)
        loader.set_epoch(epoch)
        return list(loader)

    epochs = [epoch_of(epoch) for epoch in range(2)]
    assert epochs[0] != epochs[1]
    assert epoch_of(1, skipped=3) == epochs[1][3:]


def test_accelerates_shares_do_not_overlap(path):
    shares = [set(itertools.chain(*_prepared(_stream(path), 2, index))) for index in range(2)]
    assert shares[0] | shares[1] == set(range(COUNT))
    assert len(shares[0] & shares[1]) <= -COUNT % 8  # the first rows again, to fill the last round


def test_a_buffer_of_nothing_is_refused(path):
    with pytest.raises(UserError, match="buffer: got 0"):
        _stream(path, buffer=0)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="--train: got .*absent.jsonl"):
        _stream(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("endless", [True, False])
def test_a_stream_without_a_usable_row_ends(path, endless, workers):
    stream = _stream(path, endless=endless)
    stream.max_length = 3  # no room for a prompt beside the answer
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    if not endless:
        assert list(loader) == []
        return
    with pytest.raises(UserError, match=rf"--train: got {path} without a usable row.*max_length 3"):
        next(iter(loader))
