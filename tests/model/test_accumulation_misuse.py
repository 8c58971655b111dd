"""Shared builds: errors for missing or late flushes, copies of the model, closing."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from reft_kernels.integrations.peft import share_build
from reft_kernels.model import SharedBuild
from tests.model.accumulating import (
    MICRO,
    accumulate,
    build,
    compare,
    expected,
    gradients,
    micro_batches,
)
from tests.model.families import make, stacks


def test_an_optimizer_that_steps_without_a_flush_is_refused():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    others = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with share_build(model) as shared:
        accumulate(model, micro_batches())
        others.step()
        with pytest.raises(
            RuntimeError, match=r"the optimizer steps while gradients .* call flush\(\)"
        ):
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
        before = gradients(model)
        shared.flush()
        assert all(torch.equal(before[n], g) for n, g in gradients(model).items())
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


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
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
    with pytest.raises(ValueError, match="already shares its builds"):
        share_build(model)
    shared.close()
    share_build(model).close()
    with pytest.raises(ValueError, match="got 0 models"):
        share_build(make("llama"))
    with pytest.raises(ValueError, match="got 2 models"):
        share_build(torch.nn.ModuleList([model, build()]))


def test_nothing_outlives_the_model():
    gc.collect()  # models of earlier tests
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    model = build()
    share_build(model)
    accumulate(model, micro_batches(count=1))
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1
    del model
    gc.collect()
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before
