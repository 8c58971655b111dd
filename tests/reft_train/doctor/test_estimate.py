"""The estimate counts what the real model has, and its activations follow what autograd really
keeps.
"""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from reft_train import methods, models, tasks
from reft_train.config import METHODS, RunConfig
from reft_train.doctor.estimate import estimate, kept_bytes, remedies
from reft_train.doctor.trial import random_batch
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
    assert found.gradients == found.trained and found.optimizer == 2 * found.trained
    assert found.total == found.frozen + 4 * found.trained + found.activations


def _kept(config: RunConfig) -> int:
    """Bytes that a forward keeps for the backward, weights apart, each storage once."""
    loaded = models.load(config, tasks.get(config.task))
    model = methods.adapt(config, loaded).train()
    loaded.model.config.use_cache = False
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = random_batch(
        config,
        loaded.kind,
        loaded.model.config,
        config.max_length,
        torch.Generator().manual_seed(0),
    )
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(
    "folder, task, settings",
    [
        ("tiny_llama", "gsm8k", {}),
        ("tiny_llama", "gsm8k", {"layers": [1]}),
        ("tiny_llama", "gsm8k", {"dtype": "bfloat16"}),
        ("tiny_llama", "gsm8k", {"attention": "eager"}),
        ("tiny_llama", "gsm8k", {"method": "lora"}),
        ("tiny_llama", "gsm8k", {"method": "prefix"}),
        ("tiny_llama", "gsm8k", {"method": "ia3"}),
        ("tiny_bert", "boolq", {"pooling": "mean", "architecture": "encoder"}),
        ("tiny_t5", "gsm8k", {}),
        ("tiny_bert", "glue/cola", {}),
    ],
)
def test_activations_are_within_a_factor_of_two_of_what_autograd_keeps(
    request, folder, task, settings
):
    # two: a batch half as large is the smallest step that the command advises
    config = _config(request.getfixturevalue(folder), task, **settings)
    found, real = kept_bytes(config, tasks.get(task))[0], _kept(config)
    assert real / 2 <= found <= real * 2, f"{found} estimated, {real} kept"


@pytest.mark.parametrize(
    "name, values", [("batch_size", [1, 2, 8]), ("max_length", [16, 64, 256]), ("rank", [1, 4, 16])]
)
def test_more_of_a_setting_needs_more_memory(tiny_llama, name, values):
    totals = [
        estimate(_config(tiny_llama, **{name: value}), tasks.get("gsm8k")).total for value in values
    ]
    assert all(less < more for less, more in pairwise(totals))


def test_checkpointing_needs_less_in_a_deep_model(tiny_llama, tmp_path):
    values = json.loads((tiny_llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**values, "num_hidden_layers": 24, "layer_types": None})
    )
    config, task = _config(tmp_path), tasks.get("gsm8k")
    less = config.replace(gradient_checkpointing=True)
    assert estimate(less, task).activations < estimate(config, task).activations / 2


def test_quantized_weights_are_smaller_and_the_output_layer_stays(tiny_llama):
    config, task = _config(tiny_llama, dtype="bfloat16"), tasks.get("gsm8k")
    full = estimate(config, task).frozen
    model = models.load(config, task).model
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    for kind, size in (("8bit", 1), ("4bit", 0.5)):
        changed = config.replace(device="auto", quantization=kind)
        assert full - estimate(changed, task).frozen == linear * (2 - size)


def test_a_model_that_cannot_run_without_values_has_an_estimate_too(tmp_path):
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 200, "num_local_experts": 4}
    values = MixtralConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    values.architectures = ["MixtralForCausalLM"]
    values.save_pretrained(tmp_path)
    found = estimate(_config(tmp_path, dtype="float32"), tasks.get("gsm8k"))
    assert found.activations > 4 * 64 * 200 * 4  # the logits at least


def test_remedies_that_fit_come_with_their_flags(tiny_llama):
    config, task = (
        _config(tiny_llama, batch_size=16, accumulation=2, gradient_checkpointing=True),
        tasks.get("gsm8k"),
    )
    room = estimate(config.replace(batch_size=4), task).total
    ((flags, found),) = remedies(config, task, room, cuda=False)
    assert flags == "--batch-size 4 --accumulation 8" and found.total == room


def test_remedies_that_do_not_fit_are_told_where_none_does(tiny_llama):
    config, task = _config(tiny_llama), tasks.get("gsm8k")
    found = list(remedies(config, task, 1, cuda=False))
    assert [flags for flags, _ in found] == [
        "--gradient-checkpointing",
        "--batch-size 1 --accumulation 8",
    ]


def test_no_weights_are_read(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    assert estimate(_config(tmp_path), tasks.get("gsm8k")) == estimate(
        _config(tiny_llama), tasks.get("gsm8k")
    )


def test_a_layer_that_is_not_there_is_refused(tiny_llama):
    with pytest.raises(UserError, match="layers"):
        estimate(_config(tiny_llama, layers=[7]), tasks.get("gsm8k"))
