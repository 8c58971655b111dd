"""What a run prints, also where it ended early."""

from __future__ import annotations

from dataclasses import replace

import pytest
from reft_train.memory import Peak
from reft_train.reporting import versions
from reft_train.training.outcome import Outcome

OUTCOME = Outcome(
    config={"model": "a/model", "task": "gsm8k", "method": "loreft", "output": "runs/x"},
    trainable=1_234,
    head=56,
    total=1_000_000,
    steps=20,
    losses=[(10, 2.0), (20, 1.0)],
    seconds=12.5,
    step_seconds=0.625,
    tokens_per_second=4_321.0,
    memory=Peak(500.0, 612.5, "measured somehow"),
    validation={"accuracy": 0.75},
    tests={"boolq": {"accuracy": 0.5, "f1": 0.25}, "piqa": {"accuracy": 1.0}},
    orthonormality=2.5e-7,
    versions={"torch": "9.9"},
)


@pytest.mark.parametrize(
    "shown",
    [
        "trained parameters: 1,234 (0.1234% of the model's 1,000,000)",
        "method: loreft",
        "trained parameters of the head: 56",
        "optimizer steps: 20",
        "training time: 12.5 s",
        "time of a step, median: 0.625 s",
        "padding excluded: 4,321",
        "peak memory: 612 MiB, 500 MiB of it before training",
        "measured as: measured somehow",
        "max |R Rᵀ − I| at the end: 2.50e-07",
        "training loss: 2 at step 10, 1 at the end",
        "held out: accuracy 0.75",
        "boolq: accuracy 0.5, f1 0.25",
        "piqa: accuracy 1",
        "written: runs/x",
    ],
)
def test_the_summary_has_a_line_for_each_figure(shown):
    assert any(shown in line for line in OUTCOME.summary().splitlines())


def test_the_summary_names_the_head_only_where_there_is_one():
    assert "head" not in replace(OUTCOME, head=0).summary()


def test_a_run_that_was_interrupted_at_once_has_a_summary():
    nothing = {"losses": [], "validation": {}, "tests": {}, "orthonormality": None}
    text = replace(OUTCOME, steps=0, interrupted=True, **nothing).summary()
    assert "0, interrupted" in text and "held out" not in text and "max |R" not in text


def test_versions_name_what_results_depend_on():
    found = versions()
    assert {
        "python",
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "reft_kernels",
    } <= found.keys()
    assert all(found.values())
