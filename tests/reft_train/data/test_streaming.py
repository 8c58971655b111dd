"""Streams of rows: complete, shared out without overlap, repeatable, and never held in memory
whole.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from reft_train.data import tokenizing
from reft_train.data.tokenizing import Encoder, streamed
from reft_train.errors import UserError
from reft_train.tasks.base import Example, Row, Task
from torch.utils.data import DataLoader

from tests.reft_train.tiny import tokenizer_of

COUNT = 48
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


def _stream(path, limit=32, **settings):
    encoder = Encoder(_Count(), TOKENIZER, "causal", limit)
    return streamed(path, encoder, **({"buffer": 8} | settings))


def _number(item):
    return int(TOKENIZER.decode([label for label in item["labels"] if label != -100][:-1]))


def _numbers(items, count=COUNT):
    return [_number(item) for item in itertools.islice(items, count)]


def test_every_row_comes_once_a_pass_in_another_order(path):
    numbers = _numbers(_stream(path, buffer=4), 10 * COUNT)
    assert numbers[:COUNT] != list(range(COUNT))
    # the buffer delays a row by a few places, so each comes nine to eleven times
    assert all(9 <= numbers.count(number) <= 11 for number in range(COUNT))


def test_the_order_is_a_function_of_the_seed(path):
    orders = [_numbers(_stream(path, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_a_file_of_any_size_can_be_begun(path, monkeypatch):
    def endless(path):
        return (Row({"number": n}, "") for n in itertools.count())

    monkeypatch.setattr(tokenizing, "iter_rows", endless)
    assert len(_numbers(_stream(path), 3)) == 3


def test_workers_share_the_rows(path):
    stream = _stream(path, workers=2, buffer=1)
    loader = DataLoader(
        stream, batch_size=4, collate_fn=list, num_workers=2, multiprocessing_context="fork"
    )
    numbers = _numbers(itertools.chain.from_iterable(loader), COUNT)
    assert sorted(numbers) == list(range(COUNT))


def _prepared(stream, processes, index):
    loader = DataLoader(stream, batch_size=4, collate_fn=_numbers)
    return prepare_data_loader(
        loader, torch.device("cpu"), processes, index, put_on_device=False, dispatch_batches=False
    )


@pytest.mark.parametrize("processes, index", [(1, 0), (2, 0), (2, 1)])
def test_accelerate_shares_the_rows_and_resumes_where_it_stopped(path, processes, index):
    def batches(skipped=0):
        stream = _stream(path)
        loader = skip_first_batches(_prepared(stream, processes, index), skipped)
        stream.set_epoch(0)
        return list(itertools.islice(loader, 20 - skipped))

    assert batches(skipped=3) == batches()[3:]


def test_accelerates_shares_do_not_overlap(path):
    shares = [
        set(itertools.chain(*itertools.islice(_prepared(_stream(path, buffer=1), 2, index), 6)))
        for index in range(2)
    ]
    assert shares[0] | shares[1] == set(range(COUNT)) and not shares[0] & shares[1]


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="--train: got .*absent.jsonl"):
        _stream(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_without_a_usable_row_ends(path, workers):
    # no room for a prompt beside the answer
    stream = _stream(path, limit=3, workers=workers)
    loader = DataLoader(stream, batch_size=None, num_workers=workers)
    with pytest.raises(UserError, match=rf"--train: got {path} without a usable row.*max_length 3"):
        next(iter(loader))
