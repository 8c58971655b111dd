"""Arithmetic sets: prompts, targets and scoring, by hand and on the published files."""

from __future__ import annotations

import re

import pytest
from reft_train import tasks
from reft_train.data.reading import read_rows
from reft_train.errors import UserError
from reft_train.tasks.base import Row
from reft_train.tasks.llm_adapters import ARITHMETIC as SETS

from tests.reft_train.real_data import data_folder, needs


def row(**fields) -> Row:
    return Row(
        {"instruction": "2 + 2?", "input": "", "output": "\nA: It is 4. ", "answer": "4.0"}
        | fields,
        "row 17 of train.json",
    )


def scored(generated: str, answer: object):
    task = tasks.get("math")
    return task.score(generated, task.example(row(answer=answer)))


def real(name: str, count: int):
    task = tasks.get(name)
    return task, [
        task.example(each) for each in read_rows(data_folder() / name / "test.json")[:count]
    ]


def test_the_prompt_is_alpacas_without_an_input():
    assert tasks.get("math").example(row()).prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n"
        "### Instruction:\n2 + 2?\n\n### Response:"
    )


def test_the_target_is_the_output_without_space_at_its_ends():
    example = tasks.get("math").example(row())
    assert (example.target, example.answer) == ("A: It is 4.", "4.0")


def test_a_row_to_be_scored_may_have_an_empty_output():
    assert tasks.get("mawps").example(row(output="")).target == ""


def test_a_misspelt_field_is_missing():
    fields = {"instruction": "2 + 2?", "outptu": "4", "answer": "4"}
    with pytest.raises(UserError) as caught:
        tasks.get("math").example(Row(fields, "row 17 of train.json"))
    assert str(caught.value) == (
        "row 17 of train.json: got fields instruction, outptu, answer, expected output"
    )


def test_a_missing_field_without_a_likeness_is_named():
    with pytest.raises(UserError) as caught:
        tasks.get("math").example(
            Row({"instruction": "2 + 2?", "output": "4"}, "row 17 of train.json")
        )
    assert (
        str(caught.value) == "row 17 of train.json: got fields instruction, output, expected answer"
    )


@pytest.mark.parametrize("name", ["Input", "inputs", "inptu "])
def test_a_misspelt_input_is_not_left_out_in_silence(name):
    fields = {"instruction": "Add.", name: "2 + 2", "output": "4", "answer": "4"}
    with pytest.raises(UserError, match="got fields instruction, .*, expected input"):
        tasks.get("math").example(Row(fields, "row 17 of train.json"))


@pytest.mark.parametrize(
    ("generated", "answer", "prediction", "right"),
    [
        ("so 1,234.50.", "1234.5", "1234.50", True),
        ("It is $3", 3, "3", True),
        ("-7", "-7.0", "-7", True),
        ("7", "-7.0", "7", False),
        ("4.0009", ["4"], "4.0009", True),
        ("4.002", "4", "4.002", False),
        ("none", "4", None, False),
        ("### Instruction: add 9 ### Response: it is four", "9", None, False),
        ("### Instruction: add 9 ### Response: 4", "4", "4", True),
        ("The answer is (B).", "B", "B", True),
        ("The Answer is (B).", "B", "A", False),
        ("it is b", "B", None, False),
        (" 3:4\n", "3:4", "3:4", True),
        ("it is 3:4", "3:4", "it is 3:4", False),
        ("", "3:4", None, False),
    ],
)
def test_the_answer_says_how_a_response_is_read(generated, answer, prediction, right):
    found = scored(generated, answer)
    assert (found.prediction, found.right) == (prediction, right)


@pytest.mark.parametrize(
    ("name", "recipe", "new_tokens"),
    [("math", "math", 512), ("gsm8k", "gsm8k", 256), ("AQuA", "math", 512)],
)
def test_gsm8k_alone_has_settings_of_its_own(name, recipe, new_tokens):
    task = tasks.get(name)
    assert (task.recipe, task.decoding.max_new_tokens) == (recipe, new_tokens)


def test_the_mixture_reports_all_sets():
    assert (
        tuple(tasks.get("math").test_sets)
        == SETS
        == ("MultiArith", "gsm8k", "SVAMP", "mawps", "AddSub", "AQuA", "SingleEq")
    )


# the files' outputs are a model's solutions, and many of them end in a wrong answer
@pytest.mark.parametrize(
    ("name", "count", "right", "without"),
    [
        pytest.param("gsm8k", 500, 298, 2, marks=needs("gsm8k/test.json")),
        pytest.param("SVAMP", 500, 395, 0, marks=needs("SVAMP/test.json")),
        pytest.param("AQuA", 254, 109, 1, marks=needs("AQuA/test.json")),
    ],
)
def test_published_solutions_are_as_right_as_their_final_answers(name, count, right, without):
    task, examples = real(name, count)
    found = [task.score(example.target, example) for example in examples]
    assert (
        len(found),
        sum(each.right for each in found),
        sum(each.prediction is None for each in found),
    ) == (count, right, without)


@pytest.mark.parametrize(
    ("name", "stated", "odd"),
    [
        pytest.param("gsm8k", 415, [], marks=needs("gsm8k/test.json")),
        # the dollar sign parts a minus sign from its number
        pytest.param("SVAMP", 474, ["-$293"], marks=needs("SVAMP/test.json")),
    ],
)
def test_the_number_found_in_a_published_solution_is_the_one_it_states(name, stated, odd):
    task, examples = real(name, 500)
    endings = [
        (example, re.search(r"The answer is (-?\$?[\d,.]*\d)\.?$", example.target))
        for example in examples
    ]
    statements = [
        (task.score(example.target, example).prediction, match[1])
        for example, match in endings
        if match
    ]
    differ = [text for found, text in statements if float(found) != float(re.sub("[$,]", "", text))]
    assert (len(statements), differ) == (stated, odd)


@needs("AQuA/test.json")
def test_the_first_letter_in_a_published_solution_is_often_not_the_one_it_states():
    task, examples = real("AQuA", 254)
    statements = [
        (example, re.search(r"The answer is \(([A-E])\)", example.target)) for example in examples
    ]
    statements = [(example, match[1]) for example, match in statements if match]
    same = [
        task.score(example.target, example).prediction == letter for example, letter in statements
    ]
    assert (len(same), sum(same)) == (251, 203)
