"""What a comparison leaves: JSON, CSV and text, with every method in them."""

from __future__ import annotations

import csv
import json
import math

import pytest
from reft_train import compare as command
from reft_train.errors import UserError

from tests.reft_train.compare.plans import METHODS, FakeFinal, plan, run
from tests.reft_train.fake_training import FakeTrain, finished


def refused(config, call):
    if config.method == "ia3":
        raise UserError("method ia3: <none>")


@pytest.fixture
def found(tmp_path):
    """A comparison in which a method is not available."""
    done = run(plan(tmp_path / "c"), FakeTrain(before=refused))
    command.write_results(done)
    return done


def test_the_json_has_every_method_and_run(found):
    numbers = json.loads((found.plan.folder / "compare.json").read_text())
    assert [row["method"] for row in numbers["methods"]] == list(METHODS)
    assert [(run["method"], run["seed"]) for run in numbers["runs"]] == list(found.outcomes)
    assert numbers["budget"] == {"trials": 2}


def test_the_csv_has_a_line_for_each_method(found):
    rows = list(csv.DictReader((found.plan.folder / "compare.csv").open()))
    assert [row["method"] for row in rows] == list(METHODS)
    assert float(rows[0]["test_mean"]) == found.summary.test_mean[0]
    assert rows[2]["test_mean"] == "" and rows[2]["status"] == "not available: method ia3: <none>"


def test_the_table_names_every_method(found):
    lines = command.table(found).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["loreft", "lora", "ia3"]
    assert lines[3].endswith("not available: method ia3: <none>")


def test_runs_without_test_sets_are_shown_by_their_held_out_value(tmp_path):
    class Untested(FakeFinal):
        def __call__(self, config):
            return finished(config, 0.5, tests={})

    done = run(plan(tmp_path / "c"), None, Untested())
    assert math.isnan(done.summary.test_mean[0]) and done.summary.validation_mean[0] == 0.5
    assert command.table(done).splitlines()[1].split()[1:5] == ["-", "-", "0.5", "0"]
    command.write_results(done)
    assert (tmp_path / "c" / "compare.csv").is_file()
