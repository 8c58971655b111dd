"""Accumulated micro-batches share one build: the gradients of separate builds, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from peft import get_peft_model
from torch.optim import optimizer as torch_optimizer

from reft_kernels import interventions
from reft_kernels.integrations.peft import ReftConfig, share_build
from reft_kernels.model import SharedBuild
from tests.model.families import batch, blocks, make, shake, stacks

MICRO = 4
OTHER = {"intervention": "nodireft", "init": "orthogonal", "component": "mlp_activation", "layers": [0, 2]}
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


def build(family: str = "llama", **kwargs):
    """In fp64, where the order of sums does not show."""
    model = get_peft_model(make(family), ReftConfig(rank=4, **kwargs))
    shake(model)
    return model.double().train()


def two_adapters():
    model = get_peft_model(make("llama"), ReftConfig(rank=4))
    model.add_adapter("other", ReftConfig(rank=2, **OTHER))
    model.base_model.set_adapter(["default", "other"])
    shake(model)
    return model.double().train()


def micro_batches(family: str = "llama", count: int = MICRO) -> list[dict[str, torch.Tensor]]:
    found = [batch(family, seed=seed) for seed in range(count)]
    return [{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()} for inputs in found]


def accumulate(model, inputs) -> None:
    for one in inputs:
        (model(**one).loss / len(inputs)).backward()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected(make_model, inputs) -> dict[str, torch.Tensor]:
    model = make_model()
    accumulate(model, inputs)
    return gradients(model)


def compare(model, wanted: dict[str, torch.Tensor]) -> None:
    found = gradients(model)
    assert found.keys() == wanted.keys() and any(g.abs().max() > 0 for g in found.values())
    torch.testing.assert_close(found, wanted)


def checkpointing(model, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()


@pytest.fixture
def builds(monkeypatch) -> list:
    """The stacks that were called, in order."""
    called = []
    forward = interventions._Stacked.forward
    monkeypatch.setattr(interventions._Stacked, "forward", lambda self: called.append(self) or forward(self))
    return called


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
    wanted = expected(two_adapters, inputs)
    builds.clear()
    model = two_adapters()
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    assert len(stacks(model)) == 2 and sorted(map(id, builds)) == sorted(map(id, stacks(model)))
    assert any(".other." in name for name in wanted)
    compare(model, wanted)


def test_an_adapter_that_is_frozen_builds_as_ever():
    def one_frozen():
        model = two_adapters()
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.requires_grad_(False)
        return model

    inputs, model = micro_batches(), one_frozen()
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(one_frozen, inputs))


def test_only_one_parameter_is_trained():
    def only_biases():
        model = build()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".b"))
        return model

    inputs, model = micro_batches(), only_biases()
    with share_build(model) as shared:
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(only_biases, inputs))


def test_a_head_gets_its_gradient_in_the_main_backward():
    def with_head():
        return build("bert", modules_to_save=["classifier"])

    inputs, model = micro_batches("bert"), with_head()
    wanted = expected(with_head, inputs)
    with share_build(model) as shared:
        accumulate(model, inputs)
        heads = {n: g for n, g in wanted.items() if "classifier" in n}
        assert heads
        torch.testing.assert_close(gradients(model), heads)
        shared.flush()
        compare(model, wanted)


def test_an_evaluation_in_between_disturbs_nothing():
    inputs, model = micro_batches(), build()
    wanted = expected(build, inputs)
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
    compare(model, wanted)


@MODES
@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_input"])
def test_gradient_checkpointing_builds_once_too(builds, component, reentrant):
    inputs = micro_batches()
    wanted = expected(lambda: build(component=component), inputs)
    model = build(component=component)
    checkpointing(model, reentrant)
    builds.clear()
    with share_build(model) as shared:
        accumulate(model, inputs)
        assert not gradients(model)
        shared.flush()
    assert builds == stacks(model)
    compare(model, wanted)


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


def test_an_optimizer_that_steps_without_a_flush_is_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with share_build(model) as shared:
        accumulate(model, micro_batches())
        others.step()
        with pytest.raises(RuntimeError, match=r"the optimizer steps while gradients .* call flush\(\)"):
            optimizer.step()
        shared.flush()
        optimizer.step()


def test_parameters_that_change_while_gradients_wait_are_noticed():
    model, (one, *_) = build(), micro_batches()
    with share_build(model) as shared:
        model(**one).loss.backward()
        with torch.no_grad():
            stacks(model)[0].W.add_(0.1)
        with pytest.raises(RuntimeError, match=r"parameters were changed .* flush\(\)"):
            model(**one)
        with pytest.raises(RuntimeError, match=r"parameters were changed .* flush\(\)"):
            shared.flush()
        with torch.no_grad():
            model(**one)
        shared.discard()
        model(**one).loss.backward()


def test_parameters_that_are_frozen_while_gradients_wait_are_noticed():
    model, (one, *_) = build(), micro_batches()
    with share_build(model) as shared:
        model(**one).loss.backward()
        stacks(model)[0].requires_grad_(False)
        with pytest.raises(RuntimeError, match="changed or frozen"):
            shared.flush()
        shared.discard()


def test_parameters_that_change_while_nothing_waits_are_built_again():
    def moved():
        model = build()
        with torch.no_grad():
            stacks(model)[0].X.add_(0.1)
        return model

    inputs, model = micro_batches(), build()
    with share_build(model) as shared:
        model(**inputs[0])
        with torch.no_grad():
            stacks(model)[0].X.add_(0.1)
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(moved, inputs))


@pytest.mark.parametrize("way", ["flush", "discard"])
def test_a_backward_that_comes_too_late_is_refused(way):
    model, (one, *_) = build(), micro_batches()
    with share_build(model) as shared:
        loss = model(**one).loss
        loss.backward(retain_graph=True)
        getattr(shared, way)()
        with pytest.raises(RuntimeError, match="a backward came after flush"):
            loss.backward()


def test_a_flush_with_nothing_waiting_does_nothing(builds):
    inputs, model = micro_batches(), build()
    with share_build(model) as shared:
        shared.flush()
        losses = [model(**one).loss / MICRO for one in inputs]
        shared.flush()
        for loss in losses:
            loss.backward()
        assert builds == stacks(model)
        shared.flush()
        found = gradients(model)
        shared.flush()
        assert all(torch.equal(found[n], g) for n, g in gradients(model).items())
    compare(model, expected(build, inputs))


def test_discarded_gradients_leave_no_trace():
    inputs, model = micro_batches(), build()
    with share_build(model) as shared:
        accumulate(model, inputs[:1])
        shared.discard()
        accumulate(model, inputs)
        shared.flush()
    compare(model, expected(build, inputs))


def test_closing_flushes_and_builds_as_ever(builds):
    inputs, model = micro_batches(), build()
    with share_build(model):
        accumulate(model, inputs)
    compare(model, expected(build, inputs))
    builds.clear()
    accumulate(model, inputs)
    assert builds == stacks(model) * MICRO
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_an_exception_drops_what_waits():
    model = build()
    with pytest.raises(KeyError), share_build(model) as shared:
        accumulate(model, micro_batches())
        raise KeyError
    assert shared.closed and not shared.waiting and not gradients(model)
    accumulate(model, micro_batches())
    assert gradients(model)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_of_a_model_with_a_pending_build_builds_as_ever(builds, again):
    inputs, model = micro_batches(), build()
    with share_build(model) as shared:
        accumulate(model, inputs[:2])
        other = again(model)
        builds.clear()
        (other(**inputs[0]).loss / MICRO).backward()
        assert builds == stacks(other) and gradients(other)
        accumulate(model, inputs[:2])
        shared.flush()
    compare(model, {name: 2 * grad for name, grad in expected(build, inputs[:2]).items()})


def test_a_shared_build_itself_does_not_copy():
    with SharedBuild() as shared, pytest.raises(TypeError, match="copy the model"):
        copy.deepcopy(shared)


def test_models_are_found_through_wrappers_and_share_once():
    model = build()

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

    shared = share_build(Wrapper())
    with pytest.raises(ValueError, match="shares its builds already"):
        share_build(model)
    shared.close()
    share_build(model).close()
    with pytest.raises(ValueError, match="got 0 models"):
        share_build(make("llama"))
    with pytest.raises(ValueError, match="got 2 models"):
        share_build(torch.nn.ModuleList([model, build()]))


def test_nothing_outlives_the_model():
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    model = build()
    share_build(model)
    accumulate(model, micro_batches(count=1))
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1
    del model
    gc.collect()
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before
