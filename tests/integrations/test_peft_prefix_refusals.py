"""Models, positions and calls for which prefix states are refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import transformers
from peft import LoraConfig, get_peft_model

from reft_kernels.integrations.peft import ReftConfig, keep_prefix_states
from tests.families.family import VERSION_5
from tests.integrations.test_peft_checkpointing import checkpointing
from tests.integrations.test_peft_prefix_states import MANY, build, compare, step
from tests.model.families import SPECIAL, VOCAB, batch, hook_count, make


def dropout():
    model = build()
    model.base_model.model.model.layers[1].self_attn.attention_dropout = 0.1
    return model


def dropout_module():
    model = build("gpt2")
    model.base_model.model.transformer.h[0].mlp.dropout.p = 0.2
    return model


def lora_below():
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    return get_peft_model(model, ReftConfig(rank=4, positions="l3"), adapter_name="reft").train()


def trained_embeddings():
    return build(positions="l3", modules_to_save=["embed_tokens"])


def checkpointed():
    model = build()
    checkpointing(model, reentrant=False)
    return model


def chunked():
    model = build()
    model.config.layer_types = ["chunked_attention", "full_attention", "full_attention"]
    return model


def with_router_loss():
    model = build()
    model.config.output_router_logits = True
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (with_router_loss, r"output_router_logits adds a loss over all tokens"),
        (lambda: build(positions="f7+l7"), r"edits the first tokens of a prompt in layer 0"),
        (lambda: build(positions="text:l1", layers=[2]), r"'default' counts text tokens"),
        (lambda: build(positions="all"), r"edits the first tokens of a prompt in layer 0"),
        (dropout, r"attention_dropout is 0\.1"),
        (dropout_module, r"dropout\.p is 0\.2"),
        (lora_below, r"lora_A.* is trained"),
        (trained_embeddings, r"embed_tokens.* is trained"),
        (checkpointed, r"gradient checkpointing (drops key-value caches|of transformers 4)"),
        (chunked, r"layers of type 'chunked_attention'"),
        (
            lambda: build("bloom"),
            r"no argument position_ids|no arguments labels and logits_to_keep",
        ),
        (lambda: build("t5", positions="l3"), r"encoder-decoder"),
        (lambda: make("llama"), r"got 0 models with ReFT adapters"),
        (
            lambda: build(positions="l3", component="model.embed_tokens", layers=[0]),
            r"model\.embed_tokens is edited, expected parts of model\.layers only",
        ),
    ],
)
def test_models_are_refused_before_anything_changes(model, message):
    model = model()
    hooks = hook_count(model)
    with pytest.raises(ValueError, match=message):
        keep_prefix_states(model, max_bytes=MANY)
    assert hook_count(model) == hooks


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1"])
def test_sizes_are_checked(size):
    with pytest.raises(ValueError, match="max_bytes: got"):
        keep_prefix_states(build(), max_bytes=size)


def test_gradient_checkpointing_that_starts_later():
    model = build()
    with keep_prefix_states(model, max_bytes=MANY):
        checkpointing(model, reentrant=False)
        with pytest.raises(ValueError, match="gradient checkpointing (drops|of transformers 4)"):
            step(model, batch("llama"))


def test_twice():
    model = build()
    with (
        keep_prefix_states(model, max_bytes=MANY),
        pytest.raises(ValueError, match="already keeps prefix states"),
    ):
        keep_prefix_states(model, max_bytes=MANY)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused(copied):
    model = build()
    with (
        keep_prefix_states(model, max_bytes=MANY),
        pytest.raises(TypeError, match=r"call close\(\) first"),
    ):
        copied(model)


def test_states_that_depend_on_later_tokens_are_found_out():
    model = build()
    block = model.base_model.model.model.layers[0]
    block.register_forward_hook(lambda m, a, output: output + output.mean(1, keepdim=True))
    with (
        keep_prefix_states(model, max_bytes=MANY),
        pytest.raises(ValueError, match="depend on more than the tokens before them"),
    ):
        step(model, batch("llama"))


@pytest.mark.skipif(not VERSION_5, reason="OPT of transformers 4 has no argument logits_to_keep")
def test_positions_that_count_padding_are_found_out():
    """OPT counts positions from the mask, unlike the columns that are passed as position ids."""
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.0,
        **SPECIAL,
    )
    model = build(base=transformers.OPTForCausalLM(config))
    inputs = batch("llama", side="left")
    compare(model, batch("llama"))
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    compare(model, inputs)
