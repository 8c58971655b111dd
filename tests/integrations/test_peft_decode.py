"""Decode steps of prompt edits: no code of ours but a flag, compiled or not; static caches."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

import reft_kernels as rk
from tests.integrations.test_peft_many import BASE, GREEDY, build, reft
from tests.model.families import LAYERS, VOCAB, mask_of

PACKAGE = str(Path(rk.__file__).parent)
ADAPTERS = {"a": reft(positions="f7+l7"), "b": reft(rank=2, positions="l3")}


def prompts(seed: int, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of([12, 12 - seed % 4, 9][:rows], "left", 12)
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


class Traced:
    """Counts the lines that each of our functions executes in each forward of a model."""

    def __init__(self, model) -> None:
        self.forwards: list[list[tuple[str, str, int]]] = []
        kind, outer = type(model), self

        def call(self, *args, **kwargs):
            before = sys.gettrace()
            outer.forwards.append([])
            sys.settrace(outer.trace)
            try:
                return kind.__call__(self, *args, **kwargs)
            finally:
                sys.settrace(before)

        model.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def trace(self, frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        entry, lines = len(self.forwards[-1]), 0
        self.forwards[-1].append(("", "", 0))

        def local(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            self.forwards[-1][entry] = (Path(code.co_filename).stem, code.co_name, lines)
            return local

        return local


@pytest.mark.parametrize("names", [None, ["a", "b", BASE]], ids=["one", "several"])
def test_a_decode_step_runs_no_code_of_ours_but_a_flag(names):
    model = build(ADAPTERS)
    model.set_adapter("a")
    traced = Traced(model.base_model.model)
    options = {} if names is None else {"adapter_names": names}
    model.generate(**prompts(0), **GREEDY, **options)
    prefill, *decode = traced.forwards
    assert len(decode) == 3 and {"backbone_session", "forward_context"} <= {
        f for f, _, _ in prefill
    }
    for frames in decode:
        hooks = [lines for file, name, lines in frames if file == "layer_hooks"]
        assert len(hooks) == LAYERS and max(hooks) <= 3
        others = [(file, name) for file, name, _ in frames if file != "layer_hooks"]
        # the forwards of the model and of its backbone, each with a hook before and after
        assert sorted(others) == sorted(
            [("interception", n) for n in ("_before", "__call__", "_run", "_after")] * 2
        )
        assert max(lines for _, _, lines in frames) <= 8


def test_edits_of_generated_tokens_run_in_every_step():
    model = build({"a": reft(positions="all")})
    traced = Traced(model.base_model.model)
    model.generate(**prompts(0), **GREEDY)
    for frames in traced.forwards:
        assert sum(name == "apply" and file == "forward_context" for file, name, _ in frames) == 3


class AlsoCalls(LogitsProcessor):
    """Calls the model between the steps of a generation."""

    def __init__(self, model) -> None:
        self.model, self.seen = model, []

    def __call__(self, input_ids, scores):
        self.seen.append(self.model(input_ids=prompts(5)["input_ids"]).logits)
        return scores


@pytest.mark.filterwarnings("ignore:ReFT")
def test_calls_between_and_after_decode_steps_are_edited():
    model = build(ADAPTERS)
    model.set_adapter("a")
    with torch.no_grad():
        want = model(input_ids=prompts(5)["input_ids"]).logits
        expected = model.generate(**prompts(0), **GREEDY)
        calls = AlsoCalls(model)
        got = model.generate(**prompts(0), **GREEDY, logits_processor=LogitsProcessorList([calls]))
        assert torch.equal(got, expected) and len(calls.seen) == 4
        assert all(torch.equal(seen, want) for seen in calls.seen)
        nested = []
        layer = model.base_model.model.model.layers[1]

        def call(module, args, output):
            if output.shape[1] == 1 and not nested:
                nested.append(None)
                nested[0] = model(input_ids=prompts(5)["input_ids"]).logits

        handle = layer.register_forward_hook(call)
        assert torch.equal(model.generate(**prompts(0), **GREEDY), expected)
        handle.remove()
        assert torch.equal(nested[0], want)

        def fail(module, args, output):
            if output.shape[1] == 1:
                raise RuntimeError("stop")

        handle = layer.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(**prompts(0), **GREEDY)
        handle.remove()
        assert torch.equal(model(input_ids=prompts(5)["input_ids"]).logits, want)


class Graphs:
    """A backend of torch.compile that keeps the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo):  # CompileConfig copies its fields
        return self

    def edits(self) -> list[int]:
        return [
            sum("reft_kernels.edit" in str(node.target) for node in graph.graph.nodes)
            for graph in self.graphs
        ]


@pytest.mark.parametrize("positions", ["f7+l7", "all"])
def test_compiled_decoding_with_a_static_cache(positions):
    """The tokens of eager generation, and no further compilation for requests of one shape."""
    configs = {"a": reft(positions=positions), "b": reft(rank=2, positions=positions)}
    model = build(configs, layers=1)
    model.set_adapter("a")
    torch._dynamo.reset()
    backend = Graphs()
    compiled = CompileConfig(backend=backend, mode="default", fullgraph=True)
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled}
    compilations = []
    try:
        for seed, names in enumerate(
            [None, None, ["a", "b", BASE], ["b", BASE, "a"], ["b", "b", "b"]]
        ):
            call = {
                **prompts(seed),
                **GREEDY,
                **({} if names is None else {"adapter_names": names}),
            }
            expected = model.generate(**call)
            assert torch.equal(model.generate(**call, **options), expected)
            compilations.append(len(backend.graphs))
    finally:
        torch._dynamo.reset()
    # edits of generated tokens compile once for one adapter, once for several
    edited = positions == "all"
    assert compilations == ([1, 1, 2, 2, 2] if edited else [1] * 5)
    assert backend.edits() == ([1, 1] if edited else [0])


def test_compiled_prefill_serves_other_names():
    model = build(ADAPTERS, layers=1)
    torch._dynamo.reset()
    backend = Graphs()
    inner = model.base_model.model
    names = [["a", "b", BASE], ["b", BASE, "a"], ["a", "a", "b"]]
    with torch.no_grad():
        expected = [model(**prompts(n), adapter_names=who).logits for n, who in enumerate(names)]
        inner.__dict__["forward"] = torch.compile(inner.forward, backend=backend)
        try:
            for number, who in enumerate(names):
                got = model(**prompts(number), adapter_names=who).logits
                torch.testing.assert_close(got, expected[number])
                if number == 0:
                    first = len(backend.graphs)
                assert first > 0 and len(backend.graphs) == first
        finally:
            torch._dynamo.reset()
    assert sum(backend.edits()) == 1


class PagedAttentionCache:
    """Stands for transformers' class of this name."""


def test_continuous_batching_is_refused(monkeypatch):
    model = build(ADAPTERS)
    inner = model.base_model.model
    match = "continuous batching does not tell the model where the prompts"
    with pytest.raises(ValueError, match=f"generate_batch: got .*{match}"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(ValueError, match=f"init_continuous_batching: got .*{match}"):
        inner.init_continuous_batching()
    with pytest.raises(ValueError, match=f"cache: got .*{match}"):  # adapters added meanwhile
        inner(**prompts(0), cache=PagedAttentionCache())
    monkeypatch.setattr(type(inner), "generate_batch", lambda self, inputs: (self, inputs))
    with model.disable_adapter():
        assert model.generate_batch([[3]]) == (inner, [[3]])
