"""The command line of ``search``: flags, printed table, report, exit codes."""

from __future__ import annotations

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from reft_train.__main__ import parser
from reft_train.commands import SearchOptions
from reft_train.errors import UserError
from reft_train.flags import options, passed, settings
from reft_train.search import command

from tests.reft_train.fake_training import FakeTrain


def parsed(*arguments: str):
    return parser().parse_args(["search", *arguments])


@pytest.fixture
def flags(tmp_path, tiny_llama):
    """A small search on a tiny model."""
    return [
        "--model",
        str(tiny_llama),
        "--task",
        "boolq",
        "--validation",
        "0.5",
        "--output",
        str(tmp_path / "s"),
        "--trials",
        "5",
    ]


def test_a_search_prints_its_best_trial_and_how_to_use_it(flags, capsys, tmp_path):
    assert command.run(parsed(*flags), FakeTrain()) == 0
    assert f"reft-train run --config {tmp_path / 's' / 'best.yaml'}" in capsys.readouterr().out


def test_a_search_leaves_its_table_and_database(flags, tmp_path):
    command.run(parsed(*flags), FakeTrain())
    for name in ("trials.csv", "best.yaml", "search.db"):
        assert (tmp_path / "s" / name).stat().st_size > 0


def test_an_interruption_is_said_and_returned(flags, capsys):
    def interrupt(config, call):
        if call == 1:
            raise KeyboardInterrupt

    assert command.run(parsed(*flags), FakeTrain(before=interrupt)) == 130
    assert "the same command resumes the search" in capsys.readouterr().out


def test_a_search_in_which_nothing_worked_fails(flags, capsys):
    def fail(config, call):
        raise RuntimeError("out of <memory>")

    assert command.run(parsed(*flags), FakeTrain(before=fail)) == 1
    assert "RuntimeError: out of <memory>" in capsys.readouterr().out


def space_of(flags):
    arguments = parsed(*flags)
    given = options(arguments, SearchOptions)
    return command.resolve_space(given, passed(arguments), settings(arguments))


def test_a_setting_that_a_flag_gives_is_not_varied(flags):
    assert "rank" in space_of(flags) and "rank" not in space_of([*flags, "--rank", "4"])


def test_a_flag_replaces_the_default_space(flags):
    assert space_of([*flags, "--vary", "warmup=[0, 0.1]", "rank={low: 1, high: 4}"]) == {
        "warmup": CategoricalDistribution((0.0, 0.1)),
        "rank": IntDistribution(1, 4),
    }


def test_a_setting_that_is_given_and_varied_is_refused(flags):
    with pytest.raises(UserError, match="--rank: got '4', but the search varies it"):
        space_of([*flags, "--rank", "4", "--vary", "rank=[4, 8]"])


def test_nothing_to_vary_is_refused(flags):
    with pytest.raises(UserError, match="--vary: got nothing to vary"):
        space_of([*flags, "--method", "ia3", "--lr", "1e-3"])


def test_several_processes_are_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        command.run(parsed(*flags), FakeTrain())
