"""Commonsense sets: prompts, targets, scoring and classes, by hand and on the published files."""

from __future__ import annotations

import pytest
from reft_train import tasks
from reft_train.data.reading import read_rows
from reft_train.errors import UserError
from reft_train.tasks.base import Row
from reft_train.tasks.llm_adapters import COMMONSENSE as SETS

from tests.reft_train.real_data import data_folder, needs

QUESTION = (
    "Please answer the following question with true or false, question: is it?\n\nAnswer format: "
    "true/false"
)


def row(**fields) -> Row:
    return Row(
        {"instruction": QUESTION, "input": "", "output": "ignored", "answer": "true"} | fields,
        "row 3 of a.json",
    )


def test_a_prompt_is_the_instruction_and_a_newline():
    example = tasks.get("boolq").example(row())
    assert example.prompt == QUESTION + "\n"
    assert (example.target, example.answer) == ("the correct answer is true", "true")
    assert example.row["output"] == "ignored"


def test_an_input_follows_the_instruction():
    assert tasks.get("commonsense").example(row(input="More.")).prompt == QUESTION + "\nMore.\n"


@pytest.mark.parametrize(
    ("answer", "text"), [(["true"], "true"), (" true ", "true"), (3, "3"), (2.5, "2.5")]
)
def test_an_answer_may_be_a_string_a_number_or_a_list_of_one(answer, text):
    assert tasks.get("commonsense").example(row(answer=answer)).answer == text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": ["a", "b"]}, "answer: got ['a', 'b'] (list)"),
        ({"answer": True}, "answer: got True (bool)"),
        ({"answer": None}, "answer: got None (NoneType)"),
        ({"answer": {"a": 1}}, "answer: got {'a': 1} (dict)"),
        ({"answer": float("nan")}, "answer: got nan (float), expected text, a finite number"),
        ({"answer": "  "}, "answer: got '  ' (str), expected text"),
        ({"instruction": " \n"}, "instruction: got no text"),
        ({"instruction": 5}, "instruction: got 5 (int), expected a string"),
        ({"input": ["x"]}, "input: got ['x'] (list), expected a string"),
    ],
)
def test_a_bad_field_is_named_with_its_row(fields, message):
    with pytest.raises(UserError) as caught:
        tasks.get("boolq").example(row(**fields))
    assert str(caught.value).startswith(f"row 3 of a.json: {message}")


@pytest.mark.parametrize(
    ("generated", "right"),
    [("the correct answer is true", True), ("the correct answer is true.", False)],
)
def test_scoring_wants_the_answer_exactly(generated, right):
    task = tasks.get("boolq")
    assert task.score(generated, task.example(row())).right is right


def test_a_text_without_the_trigger_is_wrong_and_has_no_prediction():
    task = tasks.get("boolq")
    scored = task.score("true", task.example(row()))
    assert (scored.prediction, scored.right) == (None, False)


@pytest.mark.parametrize("name", SETS)
def test_a_class_is_the_answers_place_among_the_labels(name):
    task = tasks.get(name)
    for number, label in enumerate(SETS[name]):
        assert task.classified(row(answer=label)).label == number


def test_a_classified_text_leaves_out_what_all_rows_share():
    found = tasks.get("boolq").classified(row())
    assert found.text == "is it?" and found.pair is None
    assert tasks.get("boolq").classified(row(input="Passage.")).pair == "Passage."


@pytest.mark.parametrize(
    "text", ["Answer format: true/false", "Say it. Answer format: as you like", "No format"]
)
def test_a_text_is_whole_where_the_answer_format_cannot_be_cut(text):
    assert tasks.get("boolq").classified(row(instruction=text)).text == text


def test_a_label_outside_the_set_is_an_error():
    with pytest.raises(
        UserError, match="row 3 of a.json: answer: got 'maybe', expected one of true, false"
    ):
        tasks.get("boolq").classified(row(answer="maybe"))


def test_the_mixture_reports_all_sets_and_has_no_classes():
    task = tasks.get("commonsense")
    assert tuple(task.test_sets) == tuple(SETS) and task.labels is None
    with pytest.raises(NotImplementedError):
        task.classified(row())


def test_accuracy_is_the_fraction_of_right_classes():
    assert tasks.get("piqa").measure([0, 1, 1, 0], [0, 1, 0, 0]) == {"accuracy": 0.75}


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([1], [1, 0])])
def test_accuracy_wants_a_prediction_for_each_reference(predictions, references):
    with pytest.raises(ValueError, match="[Ff]ound "):
        tasks.get("piqa").measure(predictions, references)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=needs(path))
        for path in ("boolq/train.json", "boolq/test.json", "piqa/test.json")
    ],
)
def test_every_published_output_is_the_target_and_is_right(path):
    task = tasks.get(path.split("/")[0])
    for each in read_rows(data_folder() / path):
        example = task.example(each)
        assert example.target == each.fields["output"]
        assert task.score(each.fields["output"], example).right
        assert "Answer format" not in task.classified(each).text
