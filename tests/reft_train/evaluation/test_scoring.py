"""Scores of a set: right answers counted, classes measured, whatever the batch size and the
order of rows.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from reft_train import tasks
from reft_train.errors import UserError
from reft_train.evaluation.scoring import score_set
from reft_train.tasks.base import Row

from tests.reft_train.evaluation.conftest import CAPITALS, adapted


def rows_of(fields):
    return [
        Row(values, f"row {number} of test.json") for number, values in enumerate(fields, start=1)
    ]


def score(rows, loaded, config, task=None, **changes):
    task = tasks.get(config.task) if task is None else task
    return score_set("here", rows, loaded, task, config.replace(**changes), progress=False)


@pytest.fixture
def own_words(tiny_llama):
    """Settings, a model, and rows to which its greedy answers are right in three cases of seven."""
    config, loaded = adapted(tiny_llama, task="jsonl")
    said = score(
        rows_of({"prompt": prompt, "completion": "?"} for prompt in CAPITALS), loaded, config
    ).predictions
    targets = [
        line["generated"] if number < 3 else "no such words" for number, line in enumerate(said)
    ]
    rows = rows_of({"prompt": p, "completion": t} for p, t in zip(CAPITALS, targets, strict=True))
    return config, loaded, rows


def test_the_score_is_the_part_of_right_answers(own_words):
    config, loaded, rows = own_words
    result = score(rows, loaded, config)
    assert result.metrics == {"exact_match": 3 / 7} and result.count == 7
    assert [line["right"] for line in result.predictions] == [True] * 3 + [False] * 4


def test_a_prediction_repeats_its_row_and_says_what_was_generated(own_words):
    config, loaded, rows = own_words
    line = score(rows, loaded, config).predictions[4]
    assert line["prompt"] == CAPITALS[4] and line["completion"] == line["answer"] == "no such words"
    assert line["index"] == 4 and line["prediction"] == line["generated"].strip()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_answers_do_not_depend_on_batch_size_and_order(batch_size, own_words):
    config, loaded, rows = own_words
    expected = score(rows, loaded, config)
    shuffled = random.Random(0).sample(rows, len(rows))
    result = score(shuffled, loaded, config, eval_batch_size=batch_size)
    assert result.metrics == expected.metrics
    assert [line["generated"] for line in result.predictions] == [
        expected.predictions[rows.index(row)]["generated"] for row in shuffled
    ]


def test_a_task_without_a_rule_is_not_scored(tiny_llama):
    config, loaded = adapted(tiny_llama, task="instruct")
    rows = rows_of([{"instruction": "count", "input": "", "output": ""}])
    result = score(rows, loaded, config)
    (line,) = result.predictions
    assert result.metrics == {} and line["right"] is None and line["generated"]


def classes(task, count=9):
    label = "answer" if task == "boolq" else "label"
    values = ["true", "false"] if task == "boolq" else [0, 1] if task == "glue/rte" else [0.5, 4.0]
    texts = {"boolq": ("instruction",)}.get(task, ("sentence1", "sentence2"))
    rows = [
        {**{name: f"{name} {'word ' * number}" for name in texts}, label: values[number % 3 % 2]}
        for number in range(count)
    ]
    return rows_of({**row, **({"input": ""} if task == "boolq" else {})} for row in rows)


@pytest.mark.parametrize("task", ["boolq", "glue/rte", "glue/stsb"])
def test_classes_are_what_the_logits_of_a_text_alone_say(task, tiny_bert):
    config, loaded = adapted(tiny_bert, task=task, positions="f1")
    rows = classes(task)
    # a number to predict is rounded otherwise in a wider batch
    result = score(rows, loaded, config, eval_batch_size=1 if task == "glue/stsb" else 4)
    chosen = tasks.get(task)
    expected, probabilities = [], []
    for row in rows:
        text = chosen.classified(row)
        with torch.no_grad():
            logits = loaded.model(
                **loaded.tokenizer(text.text, text.pair, return_tensors="pt")
            ).logits[0]
        expected.append(
            logits.item() if chosen.labels is None else chosen.labels[int(logits.argmax())]
        )
        probabilities.append(None if chosen.labels is None else logits.softmax(-1))
    given = [line["prediction"] for line in result.predictions]
    assert given == expected and len(set(given)) > 1  # not one answer to everything
    for line, wanted in zip(result.predictions, probabilities, strict=True):
        assert ("probabilities" in line) == (wanted is not None)
        if wanted is not None:
            assert list(line["probabilities"]) == list(chosen.labels)
            torch.testing.assert_close(torch.tensor(list(line["probabilities"].values())), wanted)
    assert list(result.metrics) == list(chosen.metrics)


def test_class_metrics_compare_with_the_rows_labels(tiny_bert):
    config, loaded = adapted(tiny_bert, task="glue/rte", positions="f1")
    result = score(classes("glue/rte"), loaded, config)
    right = sum(line["prediction"] == line["answer"] for line in result.predictions)
    assert (
        result.metrics == {"accuracy": right / 9}
        and result.predictions[0]["answer"] == "entailment"
    )


def test_an_output_that_is_not_finite_is_refused_with_its_row(tiny_bert):
    config, loaded = adapted(tiny_bert, task="glue/rte", positions="f1")
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("classifier.modules_to_save.default.bias"):
                parameter.fill_(float("nan"))
    with pytest.raises(
        UserError, match="model: got an output that is not finite for row 1 of test.json"
    ):
        score(classes("glue/rte"), loaded, config)


def test_no_rows_and_a_bad_row_are_refused_before_anything_is_generated(own_words):
    config, loaded, rows = own_words
    broken = replace(loaded, model=None)
    with pytest.raises(UserError, match="test set here: got no rows"):
        score([], broken, config)
    with pytest.raises(UserError, match="row 8 of test.json"):
        score([*rows, Row({"prompt": "a"}, "row 8 of test.json")], broken, config)


def test_memory_that_does_not_suffice_is_told_with_the_batch_size(own_words, monkeypatch):
    config, loaded, rows = own_words

    def full(**inputs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(loaded.model, "generate", full)
    with pytest.raises(UserError, match="eval_batch_size: got 5, which exceeds"):
        score(rows, loaded, config, eval_batch_size=5)
