"""The files of an evaluation."""

from __future__ import annotations

import datetime
import json
import math

from reft_train.evaluation.scoring import SetScore, write_predictions, write_scores


def lines(*texts):
    return [
        {"instruction": text, "output": "", "generated": f" {text}! ", "answer": ""}
        for text in texts
    ]


def test_scores_hold_what_they_are_of_each_set_and_the_average(tmp_path):
    scores = [SetScore("a", {"accuracy": 0.25}, 4, []), SetScore("b", {"accuracy": 0.75}, 8, [])]
    content = json.loads(write_scores(tmp_path / "out", scores, {"task": "math"}).read_text())
    assert content == {
        "task": "math",
        "sets": {"a": {"accuracy": 0.25, "rows": 4}, "b": {"accuracy": 0.75, "rows": 8}},
        "average": {"accuracy": 0.5},
    }


def test_a_metric_that_is_undefined_is_null(tmp_path):
    text = write_scores(tmp_path, [SetScore("stsb", {"pearson": math.nan}, 4, [])], {}).read_text()
    assert json.loads(text)["sets"]["stsb"]["pearson"] is None and "NaN" not in text


def test_predictions_are_a_line_a_row_and_replace_those_of_before(tmp_path):
    write_predictions(tmp_path, [SetScore("old", {}, 1, lines("x"))])
    write_predictions(tmp_path, [SetScore("boolq", {}, 2, lines("größe", "b"))])
    folder = tmp_path / "predictions"
    assert [path.name for path in folder.iterdir()] == ["boolq.jsonl"] and [
        path.name for path in tmp_path.iterdir()
    ] == ["predictions"]
    assert [
        json.loads(line) for line in (folder / "boolq.jsonl").read_text().splitlines()
    ] == lines("größe", "b")


def test_values_that_json_does_not_know_are_written_as_text(tmp_path):
    day = datetime.date(2024, 4, 1)
    score = SetScore("a", {}, 1, [{"day": day, "answer": ""}])
    write_predictions(tmp_path, [score])
    assert json.loads((tmp_path / "predictions" / "a.jsonl").read_text()) == {
        "day": "2024-04-01",
        "answer": "",
    }


def test_sets_that_are_called_by_a_path_get_files_of_their_own(tmp_path):
    names = ("data/a.json", "data_a.json", "/data/a.json")
    write_predictions(tmp_path, [SetScore(n, {}, 1, lines("x")) for n in names])
    assert len(list((tmp_path / "predictions").glob("*.jsonl"))) == 3
