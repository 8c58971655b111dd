"""A run whose base model has moved: it is said where it was, and the new place must hold the
same model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from reft_train.__main__ import main
from reft_train.config import read_yaml
from reft_train.models import identity
from transformers import Gemma3Config

from tests.reft_train import tiny
from tests.reft_train.runs import adapter_tensors, instructions, run, write_rows


@pytest.fixture
def moved(tiny_llama, tmp_path):
    """A finished run, the place where its model was and the place where it is now."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(tiny_llama, old)
    rows = write_rows(tmp_path / "rows.jsonl", instructions(16))
    assert run(old, tmp_path / "run", train=rows, test=rows, test_rows=2, epochs=2) == 0
    old.rename(new)
    return tmp_path / "run", old, new


def commands(output: Path, *more: object) -> dict[str, list[str]]:
    extra = list(map(str, more))
    resume = ["run", "--config", str(output / "config.yaml"), "--resume", "--skip-test"]
    return {"eval": ["eval", "--run", str(output), *extra], "resume": [*resume, *extra]}


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["eval", "resume"])
def test_the_old_place_is_named(moved, command, capsys):
    output, old, _ = moved
    line = refused(commands(output)[command], capsys)
    assert f"model: got '{old}', which does not exist" in line and line.endswith("--model FOLDER")


@pytest.mark.parametrize("command", ["eval", "resume"])
def test_a_hub_name_out_of_reach_is_named(moved, command, capsys):
    output, _, _ = moved
    path = output / "config.yaml"
    lines = path.read_text().splitlines()
    lines = ["model: nobody/none-such" if line.startswith("model:") else line for line in lines]
    path.write_text("\n".join(lines) + "\n")
    line = refused(commands(output)[command], capsys)
    assert "model: got 'nobody/none-such', which cannot be loaded (" in line
    assert line.endswith("--model FOLDER")


@pytest.mark.parametrize("command", ["eval", "resume"])
@pytest.mark.parametrize("recorded", [True, False])
def test_the_new_place_serves(moved, command, recorded):
    output, _, new = moved
    if not recorded:
        (output / "base_model.json").unlink()
    before = adapter_tensors(output / "adapter")
    assert main(commands(output, "--model", new)[command]) == 0
    # the file also holds the configuration, which names the new place
    assert adapter_tensors(output / "adapter") == before
    if command == "resume":
        assert read_yaml(output / "config.yaml")["model"] == str(new)
        assert (output / "base_model.json").is_file()


@pytest.mark.parametrize("command", ["eval", "resume"])
@pytest.mark.parametrize(
    ("name", "was", "value"),
    [
        ("model_type", "llama", "mistral"),
        ("hidden_size", 32, 64),
        ("num_hidden_layers", 2, 3),
        ("vocab_size", None, 500),
    ],
)
def test_another_model_is_refused(moved, command, name, was, value, tmp_path, capsys):
    output, _, _ = moved
    other = tiny.save_llama(tmp_path / "other")
    path = other / "config.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({**before, name: value}))
    line = refused(commands(output, "--model", other)[command], capsys)
    recorded = before[name] if was is None else was
    text = f"model: got a model with {name} {value}, but {output} was trained with"
    assert f"{text} {name} {recorded}" in line


def test_the_sizes_of_a_multimodal_model_are_its_texts():
    found = identity(
        Gemma3Config(text_config={"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 99})
    )
    assert found["model_type"] == "gemma3"
    assert (found["hidden_size"], found["num_hidden_layers"], found["vocab_size"]) == (48, 3, 99)
