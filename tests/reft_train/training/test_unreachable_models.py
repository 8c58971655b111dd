"""A model that cannot be reached is explained in one line by every command: what was tried, what
to do.
"""

from __future__ import annotations

import huggingface_hub.constants
import pytest
from reft_train.__main__ import main

from tests.reft_train.runs import instructions, write_rows

COMMANDS = {
    "run": ["--train", "{rows}"],
    "eval": ["--adapter", "none", "--test", "{rows}"],
    "search": ["--train", "{rows}", "--validation", "2"],
    "compare": ["--train", "{rows}", "--validation", "2"],
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """The last line of a command with a model that is not there."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", instructions(8))

    def check(command: str, model: object) -> str:
        more = [text.format(rows=rows) for text in COMMANDS[command]]
        assert main([command, "--model", str(model), "--task", "jsonl", *more]) == 2
        text = capfd.readouterr().err
        assert "Traceback" not in text
        return text.rstrip().splitlines()[-1]

    return check


@pytest.mark.parametrize("command", COMMANDS)
def test_a_hub_name_out_of_reach(command, refused):
    line = refused(command, "nobody/no-such-model")
    assert line.startswith(
        f"reft_train {command}: error: model: got 'nobody/no-such-model', which cannot be loaded"
    )
    for part in (
        "expected a folder",
        "the hub or its cache",
        "hf download NAME --local-dir FOLDER",
    ):
        assert part in line
    assert line.endswith("--model FOLDER")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_there_and_one_without_a_model(command, refused, tmp_path):
    line = refused(command, tmp_path / "gone")
    assert "which does not exist, expected a folder" in line and line.endswith("--model FOLDER")
    (tmp_path / "empty").mkdir()
    line = refused(command, tmp_path / "empty")
    assert "expected a folder with config.json, weights and a tokenizer" in line and line.endswith(
        "--model FOLDER"
    )
