"""Methods that put virtual tokens into the sequence: refused around a model with ReFT adapters."""

from __future__ import annotations

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, make, shake

CAUSAL = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "P_TUNING": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **CAUSAL),
    "MULTITASK_PROMPT_TUNING": lambda: MultitaskPromptTuningConfig(
        num_virtual_tokens=3, num_tasks=2, **CAUSAL
    ),
    "CPT": lambda: CPTConfig(
        cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1], **CAUSAL
    ),
    "ADAPTION_PROMPT": lambda: AdaptionPromptConfig(adapter_layers=2, adapter_len=3, **CAUSAL),
}
METHODS = pytest.mark.parametrize("method", CONFIGS)


def reft() -> PeftModel:
    model = get_peft_model(make("llama"), ReftConfig(rank=2, positions="f2+l1", **CAUSAL))
    shake(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch("llama")).logits


WAYS = {
    "get_peft_model": lambda m, c: get_peft_model(m, c),
    "another name": lambda m, c: get_peft_model(m, c, adapter_name="prompts"),
    "on the base": lambda m, c: get_peft_model(m.base_model.model, c, adapter_name="prompts"),
    "add_adapter": lambda m, c: m.add_adapter("prompts", c),
}


@METHODS
@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_by_name_and_the_model_is_as_it_was(method, way):
    model = reft()
    expected, trainable = logits(model), [n for n, p in model.named_parameters() if p.requires_grad]
    name = "default" if way == "get_peft_model" else "prompts"
    with pytest.raises(
        ValueError, match=f"adapter '{name}': {method} cannot be put around a model"
    ):
        WAYS[way](model, CONFIGS[method]())
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


@METHODS
def test_ways_that_peft_and_transformers_refuse_themselves(method):
    model = reft()
    with pytest.raises(ValueError, match="PeftMixedModel"):
        get_peft_model(model, CONFIGS[method](), mixed=True)
    with pytest.raises(ValueError, match="does not support prompt learning"):
        model.base_model.model.add_adapter(CONFIGS[method](), "prompts")


@pytest.mark.parametrize("method", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_a_saved_one_is_not_loaded_around_reft(method, tmp_path):
    get_peft_model(make("llama"), CONFIGS[method]()).save_pretrained(tmp_path)
    model = reft()
    with pytest.raises(ValueError, match=f"{method} cannot be put around a model"):
        PeftModel.from_pretrained(model, tmp_path, adapter_name="prompts")


@METHODS
def test_reft_is_refused_on_it(method):
    model = get_peft_model(make("llama"), CONFIGS[method]())
    with pytest.raises(ValueError, match=f"{method} cannot be combined with ReFT"):
        get_peft_model(model, ReftConfig(rank=2, **CAUSAL), adapter_name="reft")


@METHODS
def test_without_reft_it_works_as_ever(method):
    model = get_peft_model(make("llama"), CONFIGS[method]())
    assert list(model.peft_config) == ["default"]
    spent = reft()
    base = spent.unload()
    get_peft_model(base, CONFIGS[method]())
