"""What trials are compared by."""

from __future__ import annotations

import pytest
from reft_train.errors import UserError
from reft_train.search.study import Objective, resolve

from tests.reft_train.search.plans import config


@pytest.mark.parametrize(
    ("task", "select", "requested", "name", "selected"),
    [
        ("boolq", "none", "auto", "loss", "none"),
        ("boolq", "metric", "auto", "accuracy", "metric"),
        ("boolq", "none", "metric", "accuracy", "metric"),
        ("boolq", "loss", "loss", "loss", "loss"),
        ("glue/mrpc", "none", "auto", "accuracy", "metric"),
        ("glue/mrpc", "metric", "f1", "f1", "metric"),
        ("instruct", "none", "auto", "loss", "none"),
    ],
)
def test_the_objective_is_one_that_the_run_computes(
    tmp_path, task, select, requested, name, selected
):
    objective, settings = resolve(config(tmp_path, task=task, select=select), requested)
    assert (objective.name, settings.select) == (name, selected)


def test_glue_without_a_split_of_its_own_selects_by_the_loss_to_have_it(tmp_path):
    objective, settings = resolve(
        config(tmp_path, task="glue/rte", select="none", validation=0.0), "loss"
    )
    assert (objective.name, settings.select) == ("loss", "loss")


def test_a_search_without_held_out_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="validation: got 0, expected held-out training rows"):
        resolve(config(tmp_path, validation=0.0))


@pytest.mark.parametrize(("task", "requested"), [("boolq", "f1"), ("instruct", "metric")])
def test_a_metric_that_the_task_does_not_have_is_refused(tmp_path, task, requested):
    with pytest.raises(
        UserError, match=f"objective: got '{requested}', expected auto or one of loss"
    ):
        resolve(config(tmp_path, task=task), requested)


def test_a_missing_metric_is_named():
    with pytest.raises(UserError, match="expected one of the held-out metrics: loss"):
        Objective("f1").of({"eval_loss": 1.0})
