"""The table of sets and metrics."""

from __future__ import annotations

import math

from reft_train.evaluation.scoring import SetScore, average, render

SCORES = [
    SetScore("boolq", {"accuracy": 0.5}, 1000, []),
    SetScore("piqa", {"accuracy": 0.834}, 20, []),
]


def test_the_table_shows_each_set_and_their_average_in_aligned_columns():
    assert render(SCORES).splitlines() == [
        "set      accuracy   rows",
        "boolq        50.0  1,000",
        "piqa         83.4     20",
        "average      66.7  1,020",
    ]


def test_a_single_set_has_no_average_row():
    assert render(SCORES[:1]).splitlines() == ["set    accuracy   rows", "boolq      50.0  1,000"]


def test_the_average_is_over_metrics_that_all_sets_have():
    mixed = [
        SetScore("a", {"accuracy": 0.2, "f1": 1.0}, 1, []),
        SetScore("b", {"accuracy": 0.4}, 3, []),
    ]
    assert average(mixed) == {"accuracy": (0.2 + 0.4) / 2}
    assert "-" in render(mixed).splitlines()[2]


def test_sets_without_metrics_show_their_rows():
    assert render([SetScore("alpaca_eval", {}, 3, [])]).splitlines() == [
        "set          rows",
        "alpaca_eval     3",
    ]


def test_a_metric_that_is_undefined_is_a_dash():
    assert (
        render([SetScore("stsb", {"pearson": math.nan}, 2, [])]).splitlines()[1]
        == "stsb        -     2"
    )
