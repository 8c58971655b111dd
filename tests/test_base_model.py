"""The fingerprint of a base model: what it tells apart, and what leaves it as it is."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from reft_kernels import base_model
from reft_kernels.base_model import Fingerprint
from tests.model.families import make

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


def llama(head: str = "ForCausalLM", **changes) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(**SIZES | changes)
    return getattr(transformers, f"Llama{head}")(config)


def saved(model, folder) -> Fingerprint:
    """The fingerprint of the folder to which a model is saved."""
    model.save_pretrained(folder)
    return base_model.of_checkpoint(transformers.AutoConfig.from_pretrained(folder), folder)


def texts(ours: Fingerprint, other: Fingerprint) -> str:
    here, there = ours.differences(other)
    assert len(here) == len(there)
    return f"{', '.join(here)}; {', '.join(there)}"


def test_a_model_and_its_files_have_the_same(tmp_path):
    found = base_model.of_model(llama())
    assert found.config["model_type"] == "llama" and found.config["num_key_value_heads"] == 2
    assert found.shapes["layers.#.self_attn.k_proj.weight"] == [[16, 32]]
    assert saved(llama(), tmp_path).hash == found.hash
    llama().save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert base_model.of_checkpoint(config, tmp_path / "parts").hash == found.hash


@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_head_and_dtype_do_not_matter(head):
    other = base_model.of_model(llama(head).bfloat16())
    assert other.hash == base_model.of_model(llama()).hash


def test_adapters_on_the_model_do_not_matter():
    before = base_model.of_model(llama())
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert base_model.of_model(adapted.get_base_model()).hash == before.hash


def test_packed_weights_do_not_matter(tmp_path):
    """As of bitsandbytes: one column of bytes, in a module that knows its sizes."""
    model = llama()
    found, layer = base_model.of_model(model), model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(48 * 16, 1, dtype=torch.uint8), requires_grad=False)
    assert base_model.of_model(model).hash == found.hash
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {n: layer.weight.data.clone() for n in tensors if n.endswith("mlp.up_proj.weight")}
    assert name in packed
    save_file(tensors | packed, tmp_path / "model.safetensors")
    other = base_model.of_checkpoint(model.config, tmp_path)
    assert other.hash != found.hash and other.differences(found) == ([], [])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_does_not_matter(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "whole")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole",
        quantization_config=transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map="cpu",
    )
    assert not quantized.model.layers[0].mlp.up_proj.weight.is_floating_point()
    found = base_model.of_model(llama())
    assert base_model.of_model(quantized).hash == found.hash
    assert found.differences(saved(quantized, tmp_path / "packed")) == ([], [])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocab_size": 91}, "vocab_size 90; vocab_size 91"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2; num_hidden_layers 3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 2, "),
        ({"intermediate_size": 64}, "mlp.up_proj.weight 48x32"),
    ],
)
def test_another_architecture(changes, text, tmp_path):
    ours, other = base_model.of_model(llama()), saved(llama(**changes), tmp_path)
    assert text in texts(ours, other)


def test_another_type_of_the_same_sizes():
    config = transformers.MistralConfig(**SIZES)
    other = base_model.of_model(transformers.MistralForCausalLM(config))
    assert "model_type llama" in texts(base_model.of_model(llama()), other)


def test_shapes_count_where_the_configuration_is_the_same(tmp_path):
    """As for weights that were pruned without a word in the configuration."""
    model = llama()
    ours = base_model.of_model(model)
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Linear(32, 40, bias=False)
    text = "layers.#.mlp.up_proj.weight 48x32; layers.#.mlp.up_proj.weight 40x32"
    assert texts(ours, base_model.of_model(model)) == text


def test_only_what_both_know_is_compared():
    ours = Fingerprint({"model_type": "a", "head_dim": 4}, {"h.#.w": [[2, 3]]})
    assert ours.differences(Fingerprint({"model_type": "a", "d_ff": 1}, {"h.#.v": [[9]]})) == (
        [],
        [],
    )
    more = Fingerprint({"model_type": "a"}, {"h.#.w": [[2, 3], [5, 5]]})  # of a further tower
    assert ours.differences(more) == ([], []) and more.differences(ours) == ([], [])
    other = Fingerprint({"model_type": "a"}, {"h.#.w": [[5, 5]]})
    assert texts(ours, other) == "h.#.w 2x3; h.#.w 5x5"


def test_a_checkpoint_without_safetensors_has_its_configuration(tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    for place in (tmp_path, "no/model", "/no/such/model.gguf"):
        found = base_model.of_checkpoint(config, place)
        assert found.shapes == {} and found.config["hidden_size"] == 32
    (tmp_path / "model.safetensors").write_bytes(b"\1\0\0\0\0\0\0\0[")
    with pytest.raises(ValueError, match="model.safetensors: cannot be read as safetensors"):
        base_model.of_checkpoint(config, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_json_and_back(kind):
    found = base_model.of_model(make(kind))
    assert found.shapes and base_model.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        {},
        {"config": {}},
        {"config": {"a": []}, "shapes": {}},
        {"config": {}, "shapes": {"a": [3]}},
    ],
)
def test_malformed_json(value):
    with pytest.raises(ValueError, match="base_fingerprint: got"):
        base_model.from_json(value)
