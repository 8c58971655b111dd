"""Operators in a layer's hook, builds of R, foreign hooks, shared tensors, compiled models."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import reft_kernels.reference as reference
from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model import forward_context
from reft_kernels.model.forward_context import ForwardContext
from reft_kernels.model.layer_hooks import LayerHook
from tests.model.families import batch, blocks, hook_count, make, shake, stacks

COPIES = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::_to_copy",
    "aten::copy_",
    "aten::lift_fresh",
    "aten::nonzero",
}
INDEX_BUILDING = {
    "aten::arange",
    "aten::where",
    "aten::cumsum",
    "aten::argmax",
    "aten::index_select",
    "aten::cat",
}


class Trace(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def build(family="llama", **kwargs):
    model = get_peft_model(make(family), ReftConfig(rank=4, **kwargs))
    shake(model)
    return model


@pytest.fixture
def builds(monkeypatch):
    """Calls of the operator that builds R."""
    calls = []
    for name in ("householder", "cayley"):
        build_ = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, f=build_, n=name: calls.append(n) or f(*a))
    from reft_kernels import dispatch

    before = dispatch.forced_backend()
    dispatch.set_backend("torch")
    yield calls
    dispatch.set_backend(before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "kwargs", [{}, {"positions": "f3+l2", "share_weights": False}, {"positions": "all"}], ids=str
)
def test_a_layers_hook_runs_one_operator_and_nothing_else(monkeypatch, training, kwargs):
    """One edit per layer, without synchronization, copies or index computation."""
    model = build(**kwargs).train(training)
    inputs, traces = batch("llama"), []
    apply = ForwardContext.apply

    def traced(self, *args):
        with Trace() as trace:
            result = apply(self, *args)
        traces.append(trace.ops)
        return result

    # do not trace the operators inside a backend
    from reft_kernels import autograd

    monkeypatch.setattr(ForwardContext, "apply", traced)
    monkeypatch.setattr(autograd, "_edit_", _opaque("edit_"))
    monkeypatch.setattr(autograd, "_edit", _opaque("edit"))
    with torch.set_grad_enabled(training):
        model(**inputs)
    assert len(traces) == len(blocks("llama", model.base_model.model))
    for ops in traces:
        assert not COPIES & set(ops) and not INDEX_BUILDING & set(ops), ops


def _opaque(name):
    operator = getattr(torch.ops.reft_kernels, name)

    def call(*args):
        with torch.utils._python_dispatch._disable_current_modes():
            return operator(*args)

    return call


@pytest.mark.parametrize("parametrization", ["householder", "cayley"])
def test_R_is_built_once_a_forward_and_not_again_in_evaluation(builds, parametrization):
    model, inputs = build(parametrization=parametrization), batch("llama")
    builds.clear()
    model.train()
    for step in range(1, 4):
        model(**inputs).loss.backward()
        assert builds == [parametrization] * step
    model.eval()
    builds.clear()
    with torch.no_grad():
        for _ in range(4):
            model(**inputs)
    assert builds == [parametrization]
    with torch.no_grad():
        stacks(model)[0].X.add_(0.01)
        model(**inputs)
        model(**inputs)
    assert builds == [parametrization] * 2


def test_turned_off_nothing_is_built(builds):
    model, inputs = build(), batch("llama")
    builds.clear()
    with model.disable_adapter():
        model(**inputs)
    assert builds == []


def test_foreign_hooks_stay_and_see_the_edited_state():
    model, seen = build(), []
    block = blocks("llama", model.base_model.model)[1]
    handles = [
        block.register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        ),
        block.register_forward_pre_hook(lambda m, a: None),
        model.base_model.model.register_forward_hook(lambda m, a, o: None),
    ]
    count = hook_count(model)
    inputs = batch("llama")
    with torch.no_grad():
        model(**inputs)
        with model.disable_adapter():
            model(**inputs)
    assert not torch.equal(seen[0], seen[1])
    model.unload()
    assert hook_count(model) == len(handles) and count > len(handles)


def test_captured_hidden_states_are_the_edited_ones():
    """``output_hidden_states`` returns the input of each block and the last normalized state."""
    inputs, model, plain = batch("llama"), build(), make("llama")
    with torch.no_grad():
        ours = model(**inputs, output_hidden_states=True).hidden_states
        theirs = plain(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(ours[0], theirs[0])
    assert all(not torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_consumer_of_the_hidden_state_and_of_its_gradient(when):
    """A foreign hook adds a loss on the hidden state; the reference edits out of place."""
    grads = []
    for inplace in (True, False):
        model, kept, received = build().train(), [], []
        block = blocks("llama", model.base_model.model)[1]

        def consume(module, args, output, kept=kept, received=received):
            hidden = output[0] if isinstance(output, tuple) else output
            kept.append(hidden * 1.5)
            hidden.register_hook(lambda g: received.append(g))

        block.register_forward_hook(consume, prepend=when == "before")
        if not inplace:
            for hook in (
                h
                for m in model.modules()
                for h in m._forward_hooks.values()
                if isinstance(h, LayerHook)
            ):
                hook.target = hook.target._replace(inplace=False)
        loss = model(**batch("llama")).loss
        if when == "after":
            loss = loss + kept[0].square().mean()
        loss.backward()
        grads.append(
            [p.grad.clone() for p in stacks(model)[0].parameters()]
            + ([] if when == "before" else received[:1])
        )
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_retained_graphs_give_the_same_gradients_again():
    model = build().train()
    loss = model(**batch("llama")).loss
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in stacks(model)[0].parameters()]
    model.zero_grad()
    loss.backward()
    assert all(
        torch.equal(a, p.grad) for a, p in zip(first, stacks(model)[0].parameters(), strict=True)
    )


def test_the_first_layers_need_no_gradient_of_the_embeddings():
    model = build(layers=[1]).train()
    model(**batch("llama")).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in stacks(model)[0].parameters())


def test_copies_and_pickles_work_by_themselves():
    model, inputs = build(), batch("llama")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)
        other.unload()
        assert hook_count(other) == 0
    assert torch.equal(model(**inputs).logits, expected)


def test_autocast():
    model, inputs = build().train(), batch("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    output.loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
        for p in stacks(model)[0].parameters()
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiles_without_graph_breaks_and_without_recompiling_for_other_rows(family, grad):
    torch._dynamo.reset()
    model = build(family)
    inputs, other = (
        batch(family),
        batch(family, seed=3, side="left" if family == "llama" else "right"),
    )
    other["attention_mask"] = other["attention_mask"].roll(1, dims=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, call in enumerate((inputs, other)):
        results = []
        guard = (
            torch._dynamo.config.patch(error_on_recompile=True)
            if number
            else contextlib.nullcontext()
        )
        for subject in (model, compiled):
            model.zero_grad()
            with guard, torch.set_grad_enabled(grad):
                output = subject(**call)
            results.append([output.logits.detach()])
            if grad:
                output.loss.backward()
                results[-1] += [p.grad.clone() for p in stacks(model)[0].parameters()]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_numbers_of_rows_do_not_recompile():
    torch._dynamo.reset()
    model, inputs = build(), batch("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for number, count in enumerate((4, 6, 9)):
        columns = torch.stack([torch.randperm(24)[:count] for _ in range(3)])
        torch._dynamo.mark_dynamic(columns, 1)
        guard = (
            torch._dynamo.config.patch(error_on_recompile=True)
            if number
            else contextlib.nullcontext()
        )
        with torch.no_grad():
            expected = model(**inputs, edit_positions=columns).logits
            with guard:
                assert torch.equal(compiled(**inputs, edit_positions=columns).logits, expected)


def test_weights_and_rows_that_are_elsewhere_are_brought_once(monkeypatch):
    """Layers on another device than the stack: rows are copied once per device."""
    model, inputs = build(), batch("llama")
    expected = model(**inputs).logits
    moved = []
    copied = forward_context.ForwardContext.selection_on
    monkeypatch.setattr(
        forward_context.ForwardContext,
        "selection_on",
        lambda self, s, d: moved.append(copied(self, s, d)) or moved[-1],
    )
    constructor = forward_context.Edit.__init__
    monkeypatch.setattr(
        forward_context.Edit,
        "__init__",
        lambda self, *a: constructor(self, *a[:-1], torch.device("meta")),
    )
    assert torch.equal(model(**inputs).logits, expected)
    assert len(moved) > 1 and len({id(selection) for selection in moved}) == 1


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_bare_backbones(family):
    """A model without a head is its own backbone and accepts explicit arguments."""
    inputs = {k: v for k, v in batch(family).items() if k != "labels"}
    backbone = {"llama": "model", "bert": "bert", "gpt2": "transformer"}[family]
    model = get_peft_model(make(family).get_submodule(backbone), ReftConfig(rank=4))
    shake(model)
    whole = get_peft_model(make(family), ReftConfig(rank=4))
    shake(whole)
    seen = []
    whole.get_submodule(f"base_model.model.{backbone}").register_forward_hook(
        lambda m, a, o: seen.append(o[0])
    )
    with torch.no_grad():
        for explicit in ({}, {"prompt_lengths": [20, 12, 5]}):
            whole(**inputs, **explicit)
            assert torch.equal(model(**inputs, **explicit)[0], seen[-1])
        # some pipelines call the backbone directly
        inner = whole.get_submodule(f"base_model.model.{backbone}")
        assert torch.equal(inner(**inputs, prompt_lengths=[20, 12, 5])[0], seen[-2])


def test_explicit_positions_where_there_are_no_tokens():
    model, inputs = build("vit"), batch("vit")
    plain = make("vit")
    seen = []
    for subject in (plain, model.base_model.model):
        blocks("vit", subject)[0].register_forward_hook(
            lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o)
        )
    with torch.no_grad():
        plain(**inputs)
        model(**inputs, edit_positions=torch.tensor([[0, 4], [1, -1], [2, 3]]))
    changed = [row.nonzero().flatten().tolist() for row in (seen[0] != seen[1]).any(dim=-1)]
    assert changed == [[0, 4], [1], [2, 3]]
    with pytest.raises(ValueError, match="prompt_lengths: got 18 for example 0, expected 0 to 17"):
        model(**inputs, prompt_lengths=[18, 1, 1])
