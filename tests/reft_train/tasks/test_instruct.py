"""Instruction following: Alpaca's two prompts to the character, and answers for a judge."""

from __future__ import annotations

import pytest
from reft_train import tasks
from reft_train.errors import UserError
from reft_train.tasks.base import Row, Scored

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


def test_it_has_no_metric():
    assert tasks.get("instruct").metrics == ()


@pytest.mark.parametrize(
    ("generated", "answer"), [(" Blue\n", "Blue"), ("x ### Response: Green", "Green")]
)
def test_the_answer_is_kept_for_a_judge(generated, answer):
    assert tasks.get("instruct").score(generated, example()) == Scored(answer, None)
