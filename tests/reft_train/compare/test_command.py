"""The command line of ``compare``: methods, budgets, exit codes."""

from __future__ import annotations

import pytest
from reft_train import compare as command
from reft_train.__main__ import parser
from reft_train.commands import COMPARED as DEFAULT
from reft_train.errors import UserError

from tests.reft_train.compare.plans import FakeFinal
from tests.reft_train.fake_training import FakeTrain


def parsed(*arguments: str):
    return parser().parse_args(["compare", *arguments])


@pytest.fixture
def flags(tmp_path, tiny_llama):
    """Two methods, one trial and two seeds on a tiny model."""
    return [
        "--model",
        str(tiny_llama),
        "--task",
        "boolq",
        "--validation",
        "0.5",
        "--output",
        str(tmp_path / "c"),
        "--methods",
        "loreft",
        "lora",
        "--budget-trials",
        "1",
        "--seeds",
        "42",
        "43",
    ]


def test_a_comparison_prints_a_line_for_each_method(flags, capsys):
    assert command.run(parsed(*flags), FakeTrain(), FakeFinal()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [sum(line.split()[:1] == [title] for line in lines) for title in ("loreft", "lora")] == [
        1,
        1,
    ]


def test_a_failed_run_is_told_by_the_exit_code(flags):
    assert command.run(parsed(*flags), FakeTrain(), FakeFinal(failing=(("lora", 42),))) == 1


def test_a_method_that_is_not_available_is_no_failure(flags):
    def before(config, call):
        if config.method == "lora":
            raise UserError("method lora: none")

    assert command.run(parsed(*flags), FakeTrain(before=before), FakeFinal()) == 0


def test_an_interruption_is_said_and_returned(flags, capsys):
    assert command.run(parsed(*flags), FakeTrain(), FakeFinal(interrupted=1)) == 130
    assert "the same command resumes the comparison" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "trials"), [([], 8), (["--budget-trials", "3"], 3)])
def test_a_budget_is_in_trials(flags, more, trials):
    assert command.resolve_plan(parsed(*flags[:8], *more)).trials == trials


@pytest.mark.parametrize(
    ("task", "methods"), [("boolq", DEFAULT), ("glue/rte", (*DEFAULT, "head"))]
)
def test_the_default_methods_of_a_task(flags, task, methods):
    assert command.resolve_plan(parsed(*flags[:2], "--task", task, *flags[4:8])).methods == methods


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "loreft", "full"], "--methods: got 'full'"),
        (["--methods", "lora", "lora"], "expected each once"),
        (["--seeds", "1", "1"], "--seeds: got 1 1"),
        (["--validation", "0"], "validation: got 0"),
    ],
)
def test_a_wrong_flag_is_named(flags, more, message):
    with pytest.raises(UserError) as caught:
        command.resolve_plan(parsed(*flags, *more))
    assert message in str(caught.value)
