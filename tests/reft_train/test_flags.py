"""The flags of ``run``: one for each setting, over a file's, and a help that comes at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from reft_train.__main__ import main, parser
from reft_train.config import FIELDS, build
from reft_train.errors import UserError
from reft_train.flags import settings

from tests.reft_train.runs import ROOT

LEAST = ["--model", "a-model", "--task", "jsonl"]


def parsed(*arguments: str):
    return settings(parser().parse_args(["run", *arguments]))


def test_every_setting_has_a_flag():
    text = subprocess_help()
    assert [name for name in FIELDS if "--" + name.replace("_", "-") not in text] == []


def subprocess_help() -> str:
    program = (
        "import sys; from reft_train.__main__ import main\ntry: main(['run', '--help'])\nfinally: "
        "print(*sys.modules)"
    )
    environment = {
        "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}",
        "PATH": "/usr/bin:/bin",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_imports_nothing_heavy():
    modules = set(subprocess_help().splitlines()[-1].split())
    assert "reft_train.flags" in modules
    assert modules.isdisjoint(
        {"torch", "transformers", "peft", "accelerate", "datasets", "optuna", "matplotlib", "numpy"}
    )


def test_flags_that_are_not_given_leave_the_recipes_values():
    assert parsed(*LEAST) == build({"model": "a-model", "task": "jsonl"})
    assert parsed("--model", "m", "--task", "commonsense").epochs == 6


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "model: m\ntask: commonsense\nlr: 9e-5\nrank: 2\npacking: true\n", encoding="utf-8"
    )
    config = parsed("--config", str(path), "--rank", "4", "--no-packing")
    assert (config.lr, config.rank, config.packing, config.epochs) == (9e-5, 4, False, 6)


@pytest.mark.parametrize(
    "arguments, name, value",
    [
        (["--layers", "0;2"], "layers", [0, 2]),
        (["--layers", "all"], "layers", "all"),
        (["--lr", "9e-4"], "lr", 9e-4),
        (["--test", "a.json", "b c.json"], "test", ["a.json", "b c.json"]),
        (["--no-share-weights"], "share_weights", False),
        (["--packing"], "packing", True),
        (["--max-steps", "7"], "max_steps", 7),
        (["--positions", "f3+l1"], "positions", "f3+l1"),
        (["--lora-targets", "q_proj", "v_proj"], "lora_targets", ["q_proj", "v_proj"]),
        (["--validation", "0.25"], "validation", 0.25),
    ],
)
def test_a_flag_sets_its_setting(arguments, name, value):
    assert getattr(parsed(*LEAST, *arguments), name) == value


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--rank", "eight"], "rank: got 'eight', expected a valid integer"),
        (["--lr", "fast"], "lr: got 'fast', expected a valid number"),
        (["--layers", "0;x"], "layers: got '0;x', expected 'all' or layer numbers"),
    ],
)
def test_a_flag_with_a_wrong_value_is_refused_by_name(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        parsed(*LEAST, *arguments)


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--method", "lorefd"], "argument --method: invalid choice: 'lorefd'"),
        (["--rnak", "8"], "unrecognized arguments: --rnak"),
    ],
)
def test_a_flag_that_does_not_parse_ends_with_2(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(*LEAST, *arguments)
    assert end.value.code == 2 and complaint in capsys.readouterr().err


def test_a_misspelt_setting_in_a_file_is_told_with_the_right_name(tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_text("model: m\ntask: jsonl\nbatchsize: 3\n", encoding="utf-8")
    assert main(["run", "--config", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 1
        and f"{path}: unknown setting 'batchsize'; did you mean batch_size?" in lines[0]
    )


def test_a_model_must_be_named():
    with pytest.raises(
        UserError,
        match="--model: got none, expected a model's folder or hub name, or --config FILE",
    ):
        parsed("--task", "jsonl")
