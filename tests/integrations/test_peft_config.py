"""``ReftConfig``: validation, saving, and no changes of the model after an error."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, hook_count, make

WRONG = [
    ({"layers": "some"}, "layers: got 'some'"),
    ({"layers": []}, "layers: got"),
    ({"layers": [1, 1]}, "each layer number once"),
    ({"layers": [-1]}, "layers: got"),
    ({"rank": 0}, "rank: got 0"),
    ({"rank": 257}, "rank: got 257"),
    ({"rank": 4.0}, "rank: got 4.0"),
    ({"positions": "x3"}, "positions: got 'x3'"),
    ({"positions": "f3", "share_weights": False}, "share_weights: got False"),
    ({"pyreft_positions": 1}, "pyreft_positions: got 1"),
    (
        {"pyreft_positions": True, "positions": "prompt"},
        "pyreft_positions: got True with positions 'prompt'",
    ),
    ({"intervention": "lora"}, "intervention: got 'lora', expected one of loreft"),
    ({"component": ""}, "component: got ''"),
    ({"activation": "mish"}, "activation: got 'mish'"),
    ({"dropout": 1.0}, "dropout: got 1.0"),
    ({"parametrization": "qr"}, "parametrization: got 'qr'"),
    ({"init": "zeros"}, "init: got 'zeros'"),
    ({"embed_dim": 0}, "embed_dim: got 0"),
]


@pytest.mark.parametrize(("kwargs", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_values_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**kwargs)


UNFIT = [
    ({"component": "model.layers.{layer}.nothing"}, "component: got"),
    ({"layers": [0, 9]}, "layers: got"),
    ({"rank": 33}, "rank: got 33"),
    ({"intervention": "consreft"}, "init: got 'identity'"),
    ({"activation": "relu"}, "init: got 'identity'"),
    ({"component": "model.layers"}, "component: got 'model.layers', which names no module"),
]


@pytest.mark.parametrize("route", ["get_peft_model", "add_adapter"])
@pytest.mark.parametrize(("kwargs", "message"), UNFIT, ids=[str(k) for k, _ in UNFIT])
def test_a_configuration_that_does_not_fit_leaves_the_model_as_it_was(kwargs, message, route):
    model, inputs = make("llama"), batch("llama")
    expected, keys = model(**inputs).logits, list(model.state_dict())
    config = ReftConfig(**{"rank": 4, **kwargs})
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config) if route == "get_peft_model" else model.add_adapter(config)
    assert torch.equal(model(**inputs).logits, expected)
    assert list(model.state_dict()) == keys and hook_count(model) == 0
    assert all(p.requires_grad for p in model.parameters()) and "generate" not in model.__dict__


def test_an_error_of_pefts_own_leaves_the_model_as_it_was_too(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no")

    model = make("llama")
    keys = list(model.state_dict())
    monkeypatch.setattr(BaseTuner, "inject_adapter", fail)
    with pytest.raises(RuntimeError, match="no"):
        get_peft_model(model, ReftConfig(rank=4))
    assert list(model.state_dict()) == keys and hook_count(model) == 0
    assert all(p.requires_grad for p in model.parameters())


def test_everything_is_kept_in_the_file(tmp_path):
    config = ReftConfig(
        layers=range(2),
        rank=3,
        positions="f5+l5",
        share_weights=False,
        intervention="nodireft",
        component="mlp_output",
        activation="gelu_new",
        dropout=0.1,
        parametrization="cayley",
        init="orthogonal",
        embed_dim=32,
        modules_to_save=["score"],
        task_type="SEQ_CLS",
    )
    config.save_pretrained(tmp_path)
    for loaded in (ReftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, ReftConfig)
        assert dataclasses.asdict(loaded) == dataclasses.asdict(config)
    assert config.layers == [0, 1] and config.activation == "gelu_tanh"


def test_a_hidden_state_of_another_width_is_named():
    model = get_peft_model(make("llama"), ReftConfig(rank=4, embed_dim=16))
    with pytest.raises(
        ValueError, match=r"component: the output of 'model.layers.0' is shape .*expected .*16"
    ):
        model(**batch("llama"))


def test_the_engine_imports_neither_peft_nor_transformers():
    code = (
        "import sys, reft_kernels, reft_kernels.model; print({'peft', 'transformers', "
        "'accelerate'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )
