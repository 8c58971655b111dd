"""Instruction following: Alpaca's two prompts to the character, and the file for
``alpaca_eval``.
"""

from __future__ import annotations

import pytest
from reft_train import tasks
from reft_train.errors import UserError
from reft_train.tasks.base import Row
from reft_train.tasks.instruct import alpaca_eval_row

WHERE = "row 1 of a.json"


def example(**fields):
    return tasks.get("instruct").example(
        Row({"instruction": "Name {one}.", "output": "\nRed "} | fields, WHERE)
    )


def test_the_prompt_without_an_input():
    assert (
        example().prompt
        == example(input="").prompt
        == example(input=None).prompt
        == example(input=" \n").prompt
        == (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n"
            "### Instruction:\nName {one}.\n\n### Response:"
        )
    )


def test_the_prompt_with_an_input():
    assert example(input="{a}, {b}").prompt == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName {one}.\n\n### Input:\n{a}, {b}\n\n### Response:"
    )


def test_the_target_is_the_output_as_it_is():
    assert example().target == "\nRed "


def test_a_row_without_an_output_is_an_error():
    with pytest.raises(UserError, match="row 1 of a.json: got fields instruction, expected output"):
        tasks.get("instruct").example(Row({"instruction": "Name one."}, WHERE))


def test_answers_share_the_limit_of_the_whole_text():
    assert tasks.get("instruct").decoding.max_total_tokens == 2048


def test_it_is_not_scored():
    task = tasks.get("instruct")
    assert task.metrics == ()
    with pytest.raises(NotImplementedError):
        task.score("Red", example())


@pytest.mark.parametrize(
    ("more", "generated", "output", "dataset"),
    [
        ({"dataset": "koala"}, " Blue\n", "Blue", "koala"),
        ({}, "x ### Response: Green", "Green", "alpaca_eval"),
    ],
)
def test_a_row_for_alpaca_eval(more, generated, output, dataset):
    prediction = {"instruction": "Name {one}.", "generated": generated, **more}
    assert alpaca_eval_row(prediction, "tiny-reft") == {
        "instruction": "Name {one}.",
        "output": output,
        "dataset": dataset,
        "generator": "tiny-reft",
    }
