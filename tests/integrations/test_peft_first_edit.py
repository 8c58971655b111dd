"""Layers below the first edit: no graph, and no recomputation under gradient checkpointing."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from reft_kernels.integrations.peft import ReftConfig, from_chat_template, keep_supervised_logits
from tests.families.family import VERSION_5
from tests.integrations.test_peft_checkpointing import checkpointing, close, gradients
from tests.integrations.test_peft_supervised_logits import trainer
from tests.model.families import batch, blocks, make, shake
from tests.tiny_chat import save_chat_model

FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2"])
COMPONENTS = pytest.mark.parametrize("component", ["block_output", "mlp_output"])


def build(family="llama", layers=(2,), **config):
    model = get_peft_model(make(family), ReftConfig(rank=4, layers=list(layers), **config))
    shake(model)
    return model.train()


def forwards(family, model) -> list[int]:
    """Forwards of each block's MLP; counts while the model runs."""
    counts = [0, 0, 0]

    def count(layer):
        def hook(module, args):
            counts[layer] += 1

        return hook

    for layer, block in enumerate(blocks(family, model.base_model.model)):
        block.mlp.register_forward_pre_hook(count(layer))
    return counts


def saved_numbers(model, inputs) -> int:
    """Numbers in the tensors that autograd saves in a forward."""
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(saved)


@FAMILIES
@COMPONENTS
def test_layers_below_the_first_edit_have_no_graph(family, component):
    model, seen = build(family, component=component), []
    for block in blocks(family, model.base_model.model):
        block.register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
    model(**batch(family))
    assert [hidden.requires_grad for hidden in seen] == [False, False, True]
    assert saved_numbers(model, batch(family)) < saved_numbers(
        build(family, layers=(0,), component=component), batch(family)
    )


@FAMILIES
@pytest.mark.parametrize("first", [1, 2])
def test_they_are_not_recomputed(family, first):
    inputs, layers = batch(family), range(first, 3)
    plain, checkpointed = build(family, layers), build(family, layers)
    checkpointing(checkpointed, reentrant=False)
    counts = forwards(family, checkpointed)
    for model in (plain, checkpointed):
        model(**inputs).loss.backward()
    assert counts[:first] == [1] * first
    assert counts[first + 1 :] == [2] * (2 - first)
    assert close(gradients(checkpointed), gradients(plain))


@COMPONENTS
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
def test_gradients_of_two_forwards(component, reentrant):
    first, second = batch("llama", seed=1), batch("llama", seed=2, side="left")
    plain, checkpointed = build(component=component), build(component=component)
    checkpointing(checkpointed, reentrant)
    for model in (plain, checkpointed):
        (model(**first).loss + model(**second).loss).backward()
    assert close(gradients(checkpointed), gradients(plain))


def test_an_edit_below_of_another_adapter():
    """The first edit of all active adapters counts."""
    counts = {}
    for active in (["default"], ["default", "low"]):
        model = build()
        model.add_adapter("low", ReftConfig(rank=2, layers=[1]))
        model.base_model.set_adapter(active)
        checkpointing(model, reentrant=False)
        counts[len(active)] = forwards("llama", model)
        model(**batch("llama")).loss.backward()
    assert counts[1][:2] == [1, 1]
    assert counts[2][0] == 1 and counts[2][2] == 2


def trained_embeddings():
    model = build(modules_to_save=["embed_tokens"])
    return model, batch("llama")


def lora_below():
    model = get_peft_model(make("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    model = get_peft_model(model, ReftConfig(rank=4, layers=[2]), adapter_name="reft")
    shake(model)
    return model.train(), batch("llama")


def trained_inputs():
    model, inputs = build(), batch("llama")
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = torch.nn.Parameter(embeddings)
    return model, inputs


@pytest.mark.parametrize("case", [trained_embeddings, lora_below, trained_inputs])
def test_what_is_trained_below_keeps_its_gradient(case):
    found = []
    for checkpointed in (False, True):
        model, inputs = case()
        if checkpointed:
            checkpointing(model, reentrant=False)
        model(**inputs).loss.backward()
        grads = gradients(model)
        if "inputs_embeds" in inputs:
            grads["inputs_embeds"] = inputs["inputs_embeds"].grad
        found.append(grads)
    below = [n for n in found[0] if any(k in n for k in ("embed_tokens", "lora_A", "inputs_em"))]
    assert below and all(found[0][name] is not None for name in below)
    assert found[1].keys() == found[0].keys()
    for name, grad in found[0].items():
        assert (found[1][name] - grad).abs().max() <= 1e-6 * grad.abs().max()


def entering(model) -> list[bool]:
    """Whether what enters each block's MLP has a graph; grows as the model runs."""
    seen: list[bool] = []
    for block in blocks("llama", model):
        block.mlp.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].requires_grad and torch.is_grad_enabled())
        )
    return seen


def test_packed_rows():
    model = build()
    seen = entering(model.base_model.model)
    places = torch.cat([torch.arange(11), torch.arange(13)]).expand(2, -1)
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.where(places > 6, -100)
    model(input_ids=ids, position_ids=places, labels=labels, use_cache=False).loss.backward()
    assert seen == [False, False, False]  # the output of block 2 is edited
    assert gradients(model)


@pytest.mark.parametrize("kept", [False, True], ids=["all_logits", "supervised_logits"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointing"])
def test_trainer(tmp_path, checkpointed, kept):
    """Trainer turns gradient checkpointing on, which makes the embeddings require gradients."""
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointed else {}
    model = build(layers=(1, 2), task_type="CAUSAL_LM")
    made, _ = trainer(tmp_path, model, gradient_checkpointing=checkpointed, **settings)
    counts = forwards("llama", model)
    with keep_supervised_logits(model) if kept else contextlib.nullcontext():
        made.train()
    if checkpointed:  # transformers 4 recomputes the layer of the first edit, too
        assert counts == ([4, 4, 8] if VERSION_5 else [4, 8, 8])
    else:
        assert counts == [4, 4, 4]


def test_sft_trainer_of_trl_with_its_gradient_checkpointing(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the package trl")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder = str(save_chat_model(tmp_path / "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    row = {
        "prompt": [{"role": "user", "content": "Name a fruit"}],
        "completion": [{"role": "assistant", "content": "An apple"}],
    }
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        report_to="none",
        save_strategy="no",
        bf16=False,
        use_cpu=True,
    )
    made = trl.SFTTrainer(
        folder,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=tokenizer,
        peft_config=ReftConfig(
            rank=2,
            layers=[1],
            task_type="CAUSAL_LM",
            response_template=from_chat_template(tokenizer),
        ),
    )
    count = [0, 0]
    for number, block in enumerate(made.model.base_model.model.model.layers):

        def add(module, args, number=number):
            count[number] += 1

        block.mlp.register_forward_pre_hook(add)
    made.train()
    assert made.model.base_model.model.model.gradient_checkpointing
    assert count == [2, 2]  # once a step: the output of block 1 is edited
