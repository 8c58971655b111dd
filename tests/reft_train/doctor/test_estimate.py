"""The estimate counts what the real model has."""

from __future__ import annotations

import pytest
import torch
from reft_train import methods, models, tasks
from reft_train.config import METHODS, RunConfig
from reft_train.doctor.estimate import estimate
from reft_train.errors import UserError

GENERATING = [name for name in METHODS if name != "head"]


def _config(model, task: str = "gsm8k", **settings) -> RunConfig:
    values = {"batch_size": 4, "max_length": 64, "device": "cpu"}
    return RunConfig(model=str(model), task=task, **{**values, **settings})


def _size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _real(config: RunConfig) -> tuple[int, int, int]:
    """Frozen bytes, trained numbers and trained bytes of the model as a run builds it."""
    loaded = models.load(config, tasks.get(config.task))
    frozen = _size([*loaded.model.parameters(), *loaded.model.buffers()])
    trained = [p for p in methods.adapt(config, loaded).parameters() if p.requires_grad]
    return frozen, sum(p.numel() for p in trained), _size(trained)


@pytest.mark.parametrize("method", GENERATING)
def test_trained_parameters_are_those_of_the_real_model(tiny_llama, method):
    config = _config(tiny_llama, method=method)
    found = estimate(config, tasks.get("gsm8k"))
    assert (found.frozen, found.trainable + found.head, found.trained) == _real(config)


@pytest.mark.parametrize("method", ["loreft", "red", "lora", "head"])
def test_a_head_is_counted_beside_the_method(tiny_bert, method):
    config = _config(tiny_bert, "glue/cola", method=method)
    found = estimate(config, tasks.get("glue/cola"))
    assert (found.frozen, found.trainable + found.head, found.trained) == _real(config)
    assert found.head == 32 * 2 + 2


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "bfloat16"},
        {"layers": [1], "rank": 2},
        {"positions": "f1+l1", "share_weights": False},
    ],
)
def test_settings_change_the_counts_as_in_the_real_model(tiny_llama, settings):
    config = _config(tiny_llama, **settings)
    found = estimate(config, tasks.get("gsm8k"))
    assert (found.frozen, found.trainable, found.trained) == _real(config)


def test_an_encoder_decoder_is_counted(tiny_t5):
    config = _config(tiny_t5)
    found = estimate(config, tasks.get("gsm8k"))
    assert (found.frozen, found.trainable, found.trained) == _real(config)


def test_adam_holds_two_moments_and_the_total_is_the_sum(tiny_llama):
    found = estimate(_config(tiny_llama), tasks.get("gsm8k"))
    assert found.total == found.frozen + 4 * found.trained


def test_quantized_weights_are_smaller_and_the_output_layer_stays(tiny_llama):
    config, task = _config(tiny_llama, dtype="bfloat16"), tasks.get("gsm8k")
    full = estimate(config, task).frozen
    model = models.load(config, task).model
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    for kind, size in (("8bit", 1), ("4bit", 0.5)):
        changed = config.replace(device="auto", quantization=kind)
        assert full - estimate(changed, task).frozen == linear * (2 - size)


def test_no_weights_are_read(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert estimate(_config(tmp_path), tasks.get("gsm8k")) == estimate(
        _config(tiny_llama), tasks.get("gsm8k")
    )


def test_a_layer_that_is_not_there_is_refused(tiny_llama):
    with pytest.raises(UserError, match="layers"):
        estimate(_config(tiny_llama, layers=[7]), tasks.get("gsm8k"))
