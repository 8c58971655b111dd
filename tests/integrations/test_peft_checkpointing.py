"""Gradient checkpointing: gradients are bit-identical to those without checkpointing."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, blocks, make, shake

MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
COMPONENTS = {
    "llama": [
        "block_output",
        "mlp_output",
        "attention_input",
        "model.layers.{layer}.self_attn.o_proj",
    ],
    "gpt2": ["block_output"],
    "bloom": ["block_output"],
    "bert": ["block_output", "mlp_activation"],
    "t5": ["block_output"],
}
CASES = [
    (family, component) for family, components in COMPONENTS.items() for component in components
]


def checkpointing(model, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    model.enable_input_require_grads()


def build(family: str, component: str = "block_output", **kwargs):
    model = get_peft_model(make(family), ReftConfig(rank=4, component=component, **kwargs))
    shake(model)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether gradients are equal up to the order in which 3 layers are added.

    The tolerance is one epsilon of the largest entry per layer.
    """
    eps = torch.finfo(torch.float32).eps
    return left.keys() == right.keys() and all(
        (left[n] - right[n]).abs().max() <= 4 * eps * right[n].abs().max() for n in left
    )


@MODES
@pytest.mark.parametrize(("family", "component"), CASES)
def test_gradients_are_those_without_checkpointing(family, component, reentrant):
    inputs = batch(family)
    plain, checkpointed = build(family, component), build(family, component)
    checkpointing(checkpointed, reentrant)
    if family == "t5":
        # with checkpointing its bias of positions requires a gradient, which selects other kernels
        for model in (plain, checkpointed):
            model.base_model.model.set_attn_implementation("eager")
    losses = [m(**inputs).loss for m in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert close(gradients(checkpointed), gradients(plain))
    assert all((g.flatten(1).abs().amax(dim=1) > 0).all() for g in gradients(checkpointed).values())


@MODES
@pytest.mark.parametrize("component", ["block_output", "mlp_output"])
@pytest.mark.parametrize("order", ["first_first", "last_first", "together"])
def test_two_forwards_before_two_backwards(component, order, reentrant):
    """Each backward recomputes with the rows of its own forward."""
    first, second = batch("llama", seed=1), batch("llama", seed=2, side="left")
    second = {k: v[:2] for k, v in second.items()}
    plain, checkpointed = build("llama", component), build("llama", component)
    checkpointing(checkpointed, reentrant)
    for model in (plain, checkpointed):
        losses = [model(**first).loss, model(**second).loss]
        if order == "together":
            (losses[0] + losses[1]).backward()
        else:
            for loss in losses if order == "first_first" else losses[::-1]:
                loss.backward()
    assert close(gradients(checkpointed), gradients(plain))


@MODES
def test_dropout_draws_the_same_mask_when_recomputed(reentrant):
    inputs = batch("llama")
    plain, checkpointed = build("llama", dropout=0.5), build("llama", dropout=0.5)
    checkpointing(checkpointed, reentrant)
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        model(**inputs).loss.backward()
    assert close(gradients(checkpointed), gradients(plain))


@MODES
def test_untied_and_two_active_adapters(reentrant):
    inputs = batch("llama")
    grads = []
    for checkpointed in (False, True):
        model = build("llama", positions="f3+l2", share_weights=False)
        model.add_adapter(
            "other",
            ReftConfig(
                rank=2, layers=[1], positions="l1", intervention="nodireft", init="orthogonal"
            ),
        )
        model.base_model.set_adapter(["default", "other"])
        if checkpointed:
            checkpointing(model, reentrant)
        model(**inputs).loss.backward()
        grads.append(gradients(model))
    assert close(grads[1], grads[0])
    assert any(".other." in name for name in grads[0])


def test_non_reentrant_checkpoints_of_a_users_own(monkeypatch):
    """``torch.utils.checkpoint`` around the call of a block, including its hooks."""
    from torch.utils.checkpoint import checkpoint

    inputs, plain, wrapped = batch("gpt2"), build("gpt2"), build("gpt2")
    for block in blocks("gpt2", wrapped.base_model.model):
        block.__class__ = type(
            "Wrapped",
            (type(block),),
            {
                "__call__": lambda self, *a, **k: checkpoint(
                    super(type(self), self).__call__, *a, use_reentrant=False, **k
                )
            },
        )
    for model in (plain, wrapped):
        model(**inputs, use_cache=False).loss.backward()
    assert close(gradients(wrapped), gradients(plain))


def test_a_loss_that_bypasses_the_output_is_refused_where_it_would_lose_gradients():
    model, seen = build("llama", "mlp_output"), []
    checkpointing(model, reentrant=True)
    blocks("llama", model.base_model.model)[1].register_forward_hook(
        lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
    )
    model(**batch("llama"))
    with pytest.raises(RuntimeError, match="did not come through the model's output"):
        seen[0].sum().backward()


def test_every_second_layer_checkpointed():
    """Checkpointed and plain layers in one graph."""
    inputs, plain, mixed = (
        batch("llama"),
        build("llama", "mlp_output"),
        build("llama", "mlp_output"),
    )
    checkpointing(mixed, reentrant=True)
    blocks("llama", mixed.base_model.model)[0].gradient_checkpointing = False
    blocks("llama", mixed.base_model.model)[2].gradient_checkpointing = False
    for model in (plain, mixed):
        model(**inputs).loss.backward()
    assert close(gradients(mixed), gradients(plain))


def test_the_context_does_not_outlive_its_graph():
    import gc
    import weakref

    model = build("llama")
    loss = model(**batch("llama")).loss
    (session,) = model.base_model.model.representation_edits.editor.sessions
    (context,) = (weakref.ref(context) for context in session.live)
    loss.backward()
    with torch.no_grad():
        model(**batch("llama"))
    del loss
    gc.collect()
    assert context() is None
