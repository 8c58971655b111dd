"""The rules that find an answer in a text, on answers as odd as models give them."""

from __future__ import annotations

import pytest
from reft_train.tasks.llm_adapters import (
    after_trigger,
    first_letter,
    last_number,
    number,
    response,
    same_number,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is true", "true"),
        ("the correct answer is  solution2 \n", "solution2"),
        ("well, the correct answer is true", "true"),
        ("the correct answer is true.", "true."),
        (
            "the correct answer is true the correct answer is false",
            "true the correct answer is false",
        ),
        ("The correct answer is true", None),
        ("the correct answer is", None),
        ("the correct answer is \n", None),
        ("true", None),
        ("", None),
    ],
)
def test_an_answer_is_all_that_follows_the_first_trigger(text, found):
    assert after_trigger(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The answer is 576.", 576.0),
        ("The answer is 1,234.50.", 1234.5),
        ("It costs $3", 3.0),
        ("about -7 degrees", -7.0),
        ("-0.25", -0.25),
        ("3.", 3.0),
        ("12.5% of them", 12.5),
        ("first 4, then 5 apples", 5.0),
        ("half of it, 1/2", 2.0),
        ("10-7", -7.0),
        ("1,000,000 stars", 1000000.0),
        ("3, 4", 4.0),
        ("1.2.3", 3.0),
    ],
)
def test_the_last_number_counts_once_commas_are_dropped(text, found):
    assert float(last_number(text)) == found


@pytest.mark.parametrize("text", ["", "no number here", "-", ".", "$", "twelve"])
def test_a_text_without_digits_has_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("The Answer is (B)", "A"),
        ("The answer is (B)", "B"),
        ("Rationale: so it is E, not A.", "E"),
        ("F, then D", "D"),
        ("a b c d e", None),
        ("", None),
    ],
)
def test_the_first_capital_a_to_e_counts_even_inside_a_word(text, found):
    assert first_letter(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("prompt ### Response: 4 ### Response: 5", " 4 ### Response: 5"),
        ("plain", "plain"),
        ("### Response:", ""),
        ("", ""),
    ],
)
def test_a_response_is_what_follows_the_first_heading(text, found):
    assert response(text) == found


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("8.0", 8.0),
        ("-3", -3.0),
        ("1,234.5", 1234.5),
        ("$3", 3.0),
        ("12 %", 12.0),
        ("+4", 4.0),
        ("7.", 7.0),
        (".5", 0.5),
    ],
)
def test_an_answer_with_its_unit_is_a_number(answer, value):
    assert number(answer) == value


@pytest.mark.parametrize("answer", ["A", "", "nan", "inf", "1/2", "1e3", "three", "3 apples"])
def test_any_other_answer_is_no_number(answer):
    assert number(answer) is None


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("2.0005", True), ("1.9995", True), ("2.002", False), ("-2", False), (None, False)],
)
def test_numbers_are_the_same_within_a_thousandth(prediction, right):
    assert same_number(prediction, 2.0) is right
