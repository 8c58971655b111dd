"""Adapter folders: the model card, and errors for damaged files before the model changes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.integrations.peft.saving import HEADING
from tests.model.families import batch, hook_count, make, shake

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def build():
    model = get_peft_model(make("llama"), ReftConfig(rank=4, positions="l1", task_type="CAUSAL_LM"))
    shake(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits


class Executed:
    """An object whose unpickling executes code: ``os.mkdir`` of a folder beside the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def without_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[min(tensors)]
    save_file(tensors, folder / WEIGHTS)


def with_code(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Executed(folder / "executed")}, folder / "adapter_model.bin")


def half_a_config(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:100])


DAMAGES = {
    "truncated weights": (truncated, rf"{WEIGHTS}: cannot be loaded as safetensors"),
    "empty weights": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        rf"{WEIGHTS}: cannot be loaded as safetensors",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{CONFIG} without {WEIGHTS}"),
    "a tensor less": (without_a_tensor, "the file lacks"),
    "code": (with_code, "adapter_model.bin: cannot be loaded as a state dict .weights only"),
    "no configuration": (lambda f: (f / CONFIG).unlink(), f"Can't find '{CONFIG}'"),
    "half a configuration": (half_a_config, "delimiter|Unterminated|Expecting"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_and_the_model_is_as_it_was(damage, tmp_path):
    spoil, message = DAMAGES[damage]
    build().save_pretrained(tmp_path)
    spoil(tmp_path)
    base = make("llama")
    before, trainable = logits(base), [p.requires_grad for p in base.parameters()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert not (tmp_path / "executed").exists()
    assert torch.equal(logits(base), before) and hook_count(base) == 0
    assert [p.requires_grad for p in base.parameters()] == trainable


@pytest.mark.parametrize("damage", ["truncated weights", "no weights", "code"])
def test_a_damaged_second_adapter_leaves_the_first(damage, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    DAMAGES[damage][0](tmp_path)
    expected = logits(model)
    with pytest.raises(ValueError, match=DAMAGES[damage][1]):
        model.load_adapter(tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(model), expected)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["truncated weights", "no weights", "code"])
def test_transformers_refuses_too(damage, tmp_path):
    build().save_pretrained(tmp_path)
    DAMAGES[damage][0](tmp_path)
    with pytest.raises(
        Exception,
        match=(
            "deserializing header|No such file|Repo id|Weights only load failed|Can't find weights"
        ),
    ):
        make("llama").load_adapter(str(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_tensors_saved_by_torch_load(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(make("llama"), tmp_path)), logits(model))


def test_a_folder_below_another_is_checked(tmp_path):
    build().save_pretrained(tmp_path / "below")
    truncated(tmp_path / "below")
    with pytest.raises(ValueError, match=rf"below/{WEIGHTS}: cannot be loaded"):
        PeftModel.from_pretrained(make("llama"), str(tmp_path), subfolder="below")


def test_the_card_says_once_how_to_load_and_keeps_what_the_user_wrote(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "import reft_kernels.integrations.peft\nmodel = " in card.read_text()
    assert card.read_text().startswith("---\n") and "library_name: peft" in card.read_text()
    text = card.read_text().replace(HEADING, "## What I trained\n\nÄ table of mine.\n\n" + HEADING)
    card.write_text(text, encoding="utf-8")
    model.save_pretrained(tmp_path)
    again = card.read_text(encoding="utf-8")
    assert again.count(HEADING) == 1 and "Ä table of mine." in again


def test_a_card_of_the_user_alone_gets_the_section(tmp_path):
    (tmp_path / "README.md").write_bytes(b"# Mine\r\n\r\nwritten before\r\n")
    ReftConfig(base_model_name_or_path="some/model").save_pretrained(tmp_path)
    content = (tmp_path / "README.md").read_bytes().decode()
    assert content.startswith("# Mine\r\n\r\nwritten before") and content.count(HEADING) == 1


def test_a_named_adapter_has_a_card_in_its_own_folder(tmp_path):
    model = get_peft_model(make("llama"), ReftConfig(rank=4), adapter_name="steer")
    model.save_pretrained(tmp_path)
    assert HEADING in (tmp_path / "steer" / "README.md").read_text()
    assert json.loads((tmp_path / "steer" / CONFIG).read_text())["peft_type"] == "REFT"
