"""Batches: every token in its place, everything else masked and not learned."""

from __future__ import annotations

import pytest
import torch
from reft_train.data.collating import PaddingCollator

ITEMS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [-100], "length": 1},
]


def _lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


@pytest.mark.parametrize(
    "side, expected",
    [
        (
            "right",
            {
                "input_ids": [[5, 6, 7], [8, 9, 9]],
                "attention_mask": [[1, 1, 1], [1, 0, 0]],
                "labels": [[-100, 6, 7], [-100, -100, -100]],
            },
        ),
        (
            "left",
            {
                "input_ids": [[5, 6, 7], [9, 9, 8]],
                "attention_mask": [[1, 1, 1], [0, 0, 1]],
                "labels": [[-100, 6, 7], [-100, -100, -100]],
            },
        ),
    ],
)
def test_causal_items_are_padded_on_either_side(side, expected):
    batch = PaddingCollator(9, side)(ITEMS)
    assert _lists(batch) == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_pad_token_within_an_example_is_not_masked():
    batch = PaddingCollator(7)(ITEMS)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and batch["labels"][
        0
    ].tolist() == [-100, 6, 7]


def test_prompts_have_no_labels():
    assert set(PaddingCollator(9, "left")([{"input_ids": [5]}])) == {"input_ids", "attention_mask"}


def test_targets_of_an_encoder_decoder_are_padded_apart():
    items = [{"input_ids": [5, 6, 7], "labels": [2]}, {"input_ids": [8], "labels": [3, 4, 2, 2]}]
    batch = PaddingCollator(9)(items)
    assert batch["labels"].tolist() == [[2, -100, -100, -100], [3, 4, 2, 2]] and batch[
        "input_ids"
    ].shape == (2, 3)


@pytest.mark.parametrize("labels, dtype", [([1, 0], torch.int64), ([2.5, 4.0], torch.float32)])
def test_labels_of_texts_are_one_number_each(labels, dtype):
    items = [
        item | {"labels": label, "token_type_ids": [1] * item["length"]}
        for item, label in zip(ITEMS, labels, strict=True)
    ]
    batch = PaddingCollator(9)(items)
    assert batch["labels"].tolist() == labels and batch["labels"].dtype == dtype
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
