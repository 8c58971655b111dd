"""The table of sets and metrics."""

from __future__ import annotations

import math

from reft_train.evaluation.scoring import SetScore, average, render

SCORES = [
    SetScore("boolq", {"accuracy": 0.5}, 1000, []),
    SetScore("piqa", {"accuracy": 0.834}, 20, []),
]


def cells(scores) -> list[list[str]]:
    return [line.split() for line in render(scores).splitlines()]


def test_the_table_shows_each_set_and_their_average():
    assert cells(SCORES) == [
        ["set", "accuracy", "rows"],
        ["boolq", "50.0%", "1000"],
        ["piqa", "83.4%", "20"],
        ["average", "66.7%", "1020"],
    ]


def test_a_single_set_has_no_average_row():
    assert cells(SCORES[:1]) == [["set", "accuracy", "rows"], ["boolq", "50.0%", "1000"]]


def test_the_average_is_over_metrics_that_all_sets_have():
    mixed = [
        SetScore("a", {"accuracy": 0.2, "f1": 1.0}, 1, []),
        SetScore("b", {"accuracy": 0.4}, 3, []),
    ]
    assert average(mixed) == {"accuracy": (0.2 + 0.4) / 2}
    assert "-" in cells(mixed)[2]


def test_sets_without_metrics_show_their_rows():
    assert cells([SetScore("alpaca_eval", {}, 3, [])]) == [["set", "rows"], ["alpaca_eval", "3"]]


def test_a_metric_that_is_undefined_is_a_dash():
    assert cells([SetScore("stsb", {"pearson": math.nan}, 2, [])])[1] == ["stsb", "-", "2"]
