"""GLUE: texts, labels, metrics and the split of the validation rows."""

from __future__ import annotations

import math

import pytest
from reft_train import tasks
from reft_train.errors import UserError
from reft_train.tasks.base import Row
from reft_train.tasks.glue import SETS, selection_rows

WHERE = "row 2 of train.tsv"
CLASSES = [name for name, kind in SETS.items() if kind[1]]


def row(name: str, label: object, **fields) -> Row:
    texts = {field: f"The {field}." for field in SETS[name][0]}
    return Row(texts | {"label": label, "idx": 0} | fields, WHERE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_label_is_a_number_or_a_name(name):
    task = tasks.get(f"glue/{name}")
    for number, label in enumerate(task.labels):
        found = {task.classified(row(name, given)).label for given in (number, str(number), label)}
        assert found == {number}


def test_labels_stand_in_the_order_of_their_published_numbers():
    assert {name: SETS[name][1] for name in CLASSES} == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "qqp": ("not_duplicate", "duplicate"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
        "wnli": ("not_entailment", "entailment"),
    }


@pytest.mark.parametrize("label", [-1, 3, "maybe", "-1", 1.5, "01"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_label_outside_the_set_is_an_error(name, label):
    with pytest.raises(
        UserError, match=f"row 2 of train.tsv: label: got '{label}', expected one of 0 "
    ):
        tasks.get(f"glue/{name}").classified(row(name, label))


@pytest.mark.parametrize("label", [True, None])
def test_a_label_of_another_type_is_an_error(label):
    with pytest.raises(UserError, match="row 2 of train.tsv: label: got "):
        tasks.get("glue/sst2").classified(row("sst2", label))


@pytest.mark.parametrize(("label", "number"), [(3.8, 3.8), ("0", 0.0), (5, 5.0), ("2.5", 2.5)])
def test_stsb_learns_a_number(label, number):
    task = tasks.get("glue/stsb")
    assert task.labels is None
    found = task.classified(row("stsb", label)).label
    assert found == number and isinstance(found, float)


@pytest.mark.parametrize("label", [-1, 5.5, "good", "nan"])
def test_stsb_wants_a_number_from_0_to_5(label):
    with pytest.raises(UserError, match="expected a number from 0 to 5"):
        tasks.get("glue/stsb").classified(row("stsb", label))


@pytest.mark.parametrize(
    ("name", "text", "pair"),
    [
        ("cola", "The sentence.", None),
        ("mnli", "The premise.", "The hypothesis."),
        ("qnli", "The question.", "The sentence."),
        ("qqp", "The question1.", "The question2."),
        ("rte", "The sentence1.", "The sentence2."),
    ],
)
def test_texts_and_pairs(name, text, pair):
    found = tasks.get(f"glue/{name}").classified(row(name, 0))
    assert (found.text, found.pair) == (text, pair)


def test_one_empty_text_of_a_pair_is_allowed_and_two_are_not():
    task = tasks.get("glue/qqp")
    assert task.classified(row("qqp", 0, question2="")).pair == ""
    with pytest.raises(UserError, match="row 2 of train.tsv: question1 and question2: got no text"):
        task.classified(row("qqp", 0, question1="", question2=" "))


def test_a_misspelt_column_is_missing():
    with pytest.raises(UserError, match="got fields Sentence, label, expected sentence"):
        tasks.get("glue/cola").classified(Row({"Sentence": "x", "label": 0}, WHERE))


def test_metrics_by_hand():
    predictions, references = (
        [1, 1, 0, 0, 1],
        [1, 0, 0, 1, 1],
    )  # 2 true positives, 1 of each other kind
    assert tasks.get("glue/sst2").measure(predictions, references) == {"accuracy": 0.6}
    assert tasks.get("glue/mrpc").measure(predictions, references) == {"accuracy": 0.6, "f1": 2 / 3}
    (found,) = tasks.get("glue/cola").measure(predictions, references).values()
    # (2 * 1 - 1 * 1) / sqrt(3 * 3 * 2 * 2); the library rounds the root and the quotient otherwise
    assert found == pytest.approx(1 / 6, rel=4 * math.ulp(1.0))


def test_correlations_of_a_line_and_of_a_curve():
    found = tasks.get("glue/stsb").measure([1.0, 2.0, 3.0, 4.0], [1.0, 4.0, 9.0, 16.0])
    assert list(found) == ["pearson", "spearman"]
    # sums of deviations: 25 over sqrt(5 * 129); bounded by the rounding of a dozen operations
    assert found["pearson"] == pytest.approx(25 / math.sqrt(645), rel=16 * math.ulp(1.0))
    assert found["spearman"] == pytest.approx(1.0, rel=16 * math.ulp(1.0))


@pytest.mark.parametrize(
    ("name", "metrics"),
    [("stsb", ["pearson", "spearman"]), ("cola", ["matthews"]), ("mrpc", ["f1"])],
)
@pytest.mark.filterwarnings("error")
def test_a_prediction_that_never_changes_scores_zero(name, metrics):
    found = tasks.get(f"glue/{name}").measure([0, 0, 0], [0, 1, 1])
    assert [found[metric] for metric in metrics] == [0.0] * len(metrics)


def test_mnli_is_reported_on_its_matched_part():
    assert tuple(tasks.get("glue/mnli").test_sets) == ("validation_matched",)
    assert tuple(tasks.get("glue/rte").test_sets) == ("validation",)


@pytest.mark.parametrize(
    ("rows", "choose"), [(2, 1), (277, 138), (4999, 2499), (5000, 1000), (9815, 1000)]
)
def test_a_thousand_rows_choose_or_half_of_few(rows, choose):
    assert selection_rows(rows) == choose


def test_one_row_cannot_be_split():
    with pytest.raises(UserError, match="got 1 rows, expected at least 2"):
        selection_rows(1)


def test_an_unknown_task_is_told_the_names():
    with pytest.raises(
        UserError,
        match=(
            r"task: got 'glue/colla', expected one of commonsense, "
            r"boolq"
        ),
    ):
        tasks.get("glue/colla")


def test_every_name_gives_the_task_of_that_name_and_of_a_known_recipe():
    from reft_train.recipes import recipe

    assert len(tasks.TASKS) == 28
    for name in tasks.TASKS:
        task = tasks.get(name)
        assert task.name == name
        assert recipe(task.recipe)
