"""A search and a comparison with real trainings of a tiny model, each tested run in a process of
its own.
"""

from __future__ import annotations

import json

import pandas
import pytest
from reft_train.__main__ import main
from reft_train.compare import run_isolated
from reft_train.config import build, read_yaml
from reft_train.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(tmp_path, tiny_llama):
    """One epoch over sixteen rows, eight of them held out from twenty-four."""
    answers = [("true", "false")[number % 2] for number in range(24)]
    rows = [
        {
            "instruction": f"Is {number} even?",
            "input": "",
            "output": f"the correct answer is {answer}",
            "answer": answer,
        }
        for number, answer in enumerate(answers)
    ]
    for name, part in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    values = {
        "model": tiny_llama,
        "task": "boolq",
        "train": tmp_path / "train.json",
        "test": tmp_path / "test.json",
        "validation": 8,
        "epochs": 1,
        "batch-size": 8,
        "accumulation": 1,
        "max-length": 128,
        "max-new-tokens": 2,
        "cache": tmp_path / "cache",
        "output": tmp_path / "out",
    }
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def test_a_search_chooses_the_lowest_held_out_loss(flags, tmp_path):
    assert main(["search", *flags, "--trials", "3"]) == 0
    trials = pandas.read_csv(tmp_path / "out" / "trials.csv")
    best = trials.params_lr[trials.value.idxmin()]
    assert build(read_yaml(tmp_path / "out" / "best.yaml")).lr == pytest.approx(best)


def test_a_comparison_tests_each_method_and_names_the_one_that_cannot_run(flags, tmp_path):
    more = ["--methods", "loreft", "lora", "head", "--budget-trials", "1", "--seeds", "42", "43"]
    assert main(["compare", *flags, *more]) == 0
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]
    assert [row["seeds"] for row in rows] == [2, 2, 0]
    assert all(row["peak"] > 0 and row["step_seconds"] > 0 for row in rows[:2])
    assert rows[2]["status"].startswith("not available: method: got 'head'")


def test_an_error_of_a_tested_run_is_raised_in_the_comparison(tmp_path):
    config = build({"model": "none", "task": "boolq", "data": str(tmp_path / "gone")})
    with pytest.raises(UserError, match="--data: got .*gone, which is missing"):
        run_isolated(config.replace(output=str(tmp_path / "run")))
