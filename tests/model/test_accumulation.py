"""Micro-batches that share one build have the same gradients as with separate builds."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.integrations.peft import share_build
from tests.model.accumulating import (
    MICRO,
    accumulate,
    build,
    checkpointing,
    compare,
    expected,
    gradients,
    micro_batches,
    two_adapters,
)
from tests.model.families import blocks, stacks

CASES = {
    "loreft": {},
    "cayley": {"parametrization": "cayley"},
    "untied": {"share_weights": False, "positions": "f3+l2"},
    "nonlinear": {"intervention": "noreft", "activation": "gelu", "init": "orthogonal"},
    "constant_write": {"intervention": "lobireft"},
    "red": {"intervention": "red"},
    "some_layers": {"layers": [1]},
}
MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_separate_builds(case):
    inputs, model = micro_batches(), build(**CASES[case])
    with share_build(model) as shared:
        accumulate(model, inputs)
        assert not gradients(model) and shared.waiting
        shared.flush()
        compare(model, expected(lambda: build(**CASES[case]), inputs))


@pytest.mark.parametrize("family", ["t5", "bert", "vit"])
def test_encoders_and_encoder_decoders(family):
    inputs, model = micro_batches(family), build(family)
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
        compare(model, expected(lambda: build(family), inputs))


def test_R_is_built_once_for_each_optimizer_step(builds):
    model, inputs = build(), micro_batches()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with share_build(model) as shared:
        for step in range(1, 4):
            accumulate(model, inputs)
            shared.flush()
            optimizer.step()
            optimizer.zero_grad()
            assert builds == stacks(model) * step


def test_a_trained_model_is_the_one_that_separate_builds_train():
    inputs, models = micro_batches(), [build(), build()]
    shared = share_build(models[1])
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            accumulate(model, inputs)
            if model is models[1]:
                shared.flush()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())
    assert not torch.equal(stacks(models[0])[0].X, stacks(build())[0].X)


def test_two_adapters_of_different_widths(builds):
    inputs = micro_batches()
    want = expected(two_adapters, inputs)
    builds.clear()
    model = two_adapters()
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    assert len(stacks(model)) == 2 and sorted(map(id, builds)) == sorted(map(id, stacks(model)))
    assert any(".other." in name for name in want)
    compare(model, want)


@pytest.mark.parametrize(
    "make, trained",
    [
        (two_adapters, lambda name: ".default." not in name),
        (build, lambda name: name.endswith(".b")),
    ],
    ids=["one_of_two_adapters", "only_biases"],
)
def test_what_is_frozen_gets_no_gradient(make, trained):
    def partly_frozen():
        model = make()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and trained(name))
        return model

    inputs, model = micro_batches(), partly_frozen()
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(partly_frozen, inputs))


def test_a_head_gets_its_gradient_in_the_main_backward():
    def with_head():
        return build("bert", modules_to_save=["classifier"])

    inputs, model = micro_batches("bert"), with_head()
    want = expected(with_head, inputs)
    with share_build(model) as shared:
        accumulate(model, inputs)
        heads = {n: g for n, g in want.items() if "classifier" in n}
        assert heads
        torch.testing.assert_close(gradients(model), heads)
        shared.flush()
        compare(model, want)


def test_an_evaluation_in_between_disturbs_nothing():
    inputs, model = micro_batches(), build()
    want = expected(build, inputs)
    with torch.no_grad():
        logits = build().eval()(**inputs[0]).logits
    with share_build(model) as shared:
        for one in inputs:
            loss = model(**one).loss / MICRO
            with torch.no_grad():
                assert torch.equal(model.eval()(**inputs[0]).logits, logits)
            model.train()
            loss.backward()
        shared.flush()
    compare(model, want)


@MODES
@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_input"])
def test_gradient_checkpointing_builds_once_too(builds, component, reentrant):
    inputs = micro_batches()
    want = expected(lambda: build(component=component), inputs)
    model = build(component=component)
    checkpointing(model, reentrant)
    builds.clear()
    with share_build(model) as shared:
        accumulate(model, inputs)
        assert not gradients(model)
        shared.flush()
    assert builds == stacks(model)
    compare(model, want)


@MODES
def test_layers_with_and_without_checkpoints(reentrant):
    inputs, model = micro_batches(), build(component="mlp_output")
    checkpointing(model, reentrant)
    for layer in (0, 2):
        blocks("llama", model.base_model.model)[layer].gradient_checkpointing = False
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(lambda: build(component="mlp_output"), inputs))


@MODES
def test_two_forwards_before_two_backwards(reentrant):
    inputs, model = micro_batches(count=2), build()
    checkpointing(model, reentrant)
    with share_build(model) as shared:
        losses = [model(**one).loss / 2 for one in inputs]
        for loss in losses:
            loss.backward()
        shared.flush()
    compare(model, expected(build, inputs))


def test_a_compiled_model_builds_for_itself_and_gets_its_gradients():
    torch._dynamo.reset()
    inputs, model = micro_batches(count=2), build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with share_build(compiled) as shared:
        accumulate(compiled, inputs)
        assert not shared.waiting
        shared.flush()
    compare(model, expected(build, inputs))
    torch._dynamo.reset()


def test_compiled_and_plain_micro_batches_of_one_step():
    torch._dynamo.reset()
    inputs, model = micro_batches(count=2), build()
    compiled = torch.compile(model, backend="eager")
    with share_build(model) as shared:
        for subject, one in zip((compiled, model), inputs, strict=True):
            (subject(**one).loss / 2).backward()
        shared.flush()
    compare(model, expected(build, inputs))
    torch._dynamo.reset()


def test_scaled_losses_give_scaled_gradients():
    scale, inputs, model = 2.0**16, micro_batches(), build()
    with share_build(model) as shared:
        for one in inputs:
            (scale * model(**one).loss / MICRO).backward()
        shared.flush()
    for parameter in stacks(model)[0].parameters():
        parameter.grad /= scale
    compare(model, expected(build, inputs))


def test_gradients_add_to_those_that_are_there():
    inputs, model = micro_batches(), build()
    accumulate(model, inputs)
    once = gradients(model)
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    compare(model, {name: 2 * grad for name, grad in once.items()})
