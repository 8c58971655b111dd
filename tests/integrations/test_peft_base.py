"""Saved adapters hold the fingerprint of their base model, which loading compares."""

from __future__ import annotations

import json
import warnings

import pytest
from peft import PeftModel, get_peft_model

from reft_kernels import base_model
from reft_kernels.integrations.peft import ReftConfig
from tests.test_base_model import llama

CONFIG = "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    get_peft_model(llama(), ReftConfig(rank=2)).save_pretrained(tmp_path)
    return tmp_path


def recorded(folder) -> base_model.Fingerprint:
    return base_model.from_json(json.loads((folder / CONFIG).read_text())["base_fingerprint"])


def test_saving_writes_it(folder):
    assert recorded(folder) == base_model.of_model(llama())


def test_the_same_model_loads_silently(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(llama().bfloat16(), folder)


def test_another_model_of_the_same_width_gives_a_warning(folder, tmp_path):
    other = llama(num_attention_heads=2, vocab_size=99)
    with pytest.warns(UserWarning, match="base model: it has vocab_size 90, num_attention_heads 4"):
        model = PeftModel.from_pretrained(other, folder)
    model.save_pretrained(tmp_path / "new")
    assert recorded(tmp_path / "new").config["vocab_size"] == 99


def test_a_configuration_serves_several_models(tmp_path):
    config = ReftConfig(rank=2)
    get_peft_model(llama(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(llama(vocab_size=99), config).save_pretrained(tmp_path)
    assert recorded(tmp_path).config["vocab_size"] == 99


def test_a_second_adapter_gives_a_warning_too(folder):
    model = get_peft_model(llama(vocab_size=99), ReftConfig(rank=2))
    with pytest.warns(UserWarning, match="adapter 'second' was trained on another base model"):
        model.load_adapter(str(folder), "second")


def test_a_folder_without_one_loads_silently_and_saves_one(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["base_fingerprint"], config["save_id"]
    (folder / "adapter_model.safetensors").rename(folder / "old")
    _without_metadata(folder)
    (folder / CONFIG).write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(llama(vocab_size=99), folder)
    model.save_pretrained(folder)
    assert recorded(folder).config["vocab_size"] == 99


def _without_metadata(folder):
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "old"), folder / "adapter_model.safetensors")


def test_tokens_that_are_added_later_count(tmp_path):
    model = get_peft_model(llama(), ReftConfig(rank=2))
    model.resize_token_embeddings(95)
    model.save_pretrained(tmp_path)
    assert recorded(tmp_path).config["vocab_size"] == 95


def test_a_malformed_one_is_refused(folder):
    text = (folder / CONFIG).read_text()
    config = json.loads(text) | {"base_fingerprint": {"config": 3}}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="base_fingerprint: got"):
        PeftModel.from_pretrained(llama(), folder)
