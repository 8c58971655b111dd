"""Concurrent calls of one model: threads, tasks, nested calls and replicas are independent."""

from __future__ import annotations

import asyncio
import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList

import reft_kernels as rk
from reft_kernels import dispatch
from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model.interception import InterceptedForward
from tests.model.families import VOCAB, batch, make, shake

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
BACKENDS = (
    ["torch", "cpu"]
    if dispatch.unsupported_reason("cpu", "edit", "cpu", torch.float32) is None
    else ["torch"]
)


def build(positions: str = "f2+l2"):
    """A model with adapters "one" and "two"."""
    model = get_peft_model(
        make("llama"), ReftConfig(rank=4, positions=positions), adapter_name="one"
    )
    model.add_adapter("two", ReftConfig(rank=2, positions="l3", layers=[0, 2], init="orthogonal"))
    for seed, name in enumerate(("one", "two")):
        model.set_adapter(name)
        shake(model, seed=seed)
    model.set_adapter("one")
    return model.eval()


def prompt(seed: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, 4 + seed % 17), generator=generator)


def request(model, seed: int):
    """A call whose kind depends on the seed: generate or forward, with or without adapter names
    and prompt lengths.
    """
    ids, kind = prompt(seed, 1 + seed % 3), seed % 5
    names = (
        {}
        if kind < 2
        else {
            "adapter_names": [
                ("one", "two", "__base__")[(seed + row) % 3] for row in range(len(ids))
            ]
        }
    )
    with torch.no_grad():
        if kind in (0, 2):
            out = model.generate(
                input_ids=ids,
                max_new_tokens=3,
                return_dict_in_generate=True,
                output_logits=True,
                **GREEDY,
                **names,
            )
            return torch.stack(out.logits)
        if kind == 4:
            return model(
                input_ids=ids, prompt_lengths=[max(1, ids.shape[1] // 2)] * len(ids), **names
            ).logits
        return model(input_ids=ids, **names).logits


@pytest.mark.filterwarnings("ignore:ReFT")
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_threads_two_hundred_requests(backend):
    model = build()
    dispatch_before = dispatch.forced_backend()
    rk.set_backend(backend)
    try:
        seeds = list(range(200))
        alone = [request(model, seed) for seed in seeds]
        random.Random(0).shuffle(seeds)
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda seed: request(model, seed), seeds))
    finally:
        rk.set_backend(dispatch_before)
    wrong = [
        seed for seed, got in zip(seeds, together, strict=True) if not torch.equal(got, alone[seed])
    ]
    assert wrong == []


@pytest.mark.filterwarnings("ignore:ReFT")
def test_a_call_that_runs_while_another_is_inside_a_layer():
    model = build()
    long, short = prompt(16), prompt(1)
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in (long, short)]
        for first, second in ((long, short), (short, long)):
            inside, results = threading.Event(), {}

            def pause(module, args, inside=inside, results=results, second=second):
                if threading.current_thread() is threading.main_thread() and not inside.is_set():
                    inside.set()
                    thread = threading.Thread(target=lambda: results.update(other=run(second)))
                    thread.start()
                    thread.join(60)

            def run(ids):
                with torch.no_grad():
                    return model(input_ids=ids).logits

            handle = model.base_model.model.model.layers[1].register_forward_pre_hook(pause)
            results["own"] = model(input_ids=first).logits
            handle.remove()
            want = dict(zip((id(long), id(short)), expected, strict=True))
            assert torch.equal(results["own"], want[id(first)])
            assert torch.equal(results["other"], want[id(second)])


@pytest.mark.filterwarnings("ignore:ReFT")
def test_tasks_of_an_event_loop():
    model = build()
    seeds = list(range(30))
    alone = [request(model, seed) for seed in seeds]

    async def one(seed):
        await asyncio.sleep(0.001 * (seed % 3))
        return await asyncio.to_thread(request, model, seed) if seed % 2 else request(model, seed)

    async def run():
        return await asyncio.gather(*(one(seed) for seed in seeds))

    assert all(torch.equal(a, b) for a, b in zip(asyncio.run(run()), alone, strict=True))


class Nested(LogitsProcessor):
    """A logits processor that calls the generating model: a forward and a nested ``generate``."""

    def __init__(self, model, other):
        self.model, self.other, self.seen = model, other, []

    def __call__(self, input_ids, scores):
        self.seen.append(self.model(input_ids=self.other).logits)
        self.seen.append(self.model.generate(input_ids=self.other, max_new_tokens=2, **GREEDY))
        return scores


@pytest.mark.filterwarnings("ignore:ReFT")
def test_calls_nested_in_generate_and_in_a_hook():
    model = build()
    ids, other = prompt(9), prompt(4)
    with torch.no_grad():
        logits, tokens = (
            model(input_ids=other).logits,
            model.generate(input_ids=other, max_new_tokens=2, **GREEDY),
        )
        expected = model.generate(input_ids=ids, max_new_tokens=3, **GREEDY)
        plain = model(input_ids=ids).logits
        nested = Nested(model, other)
        got = model.generate(
            input_ids=ids,
            max_new_tokens=3,
            logits_processor=LogitsProcessorList([nested]),
            **GREEDY,
        )
        assert torch.equal(got, expected)
        assert len(nested.seen) == 6
        assert all(
            torch.equal(seen, want)
            for seen, want in zip(nested.seen, [logits, tokens] * 3, strict=True)
        )

        inside = []

        def again(module, args):
            if not inside:
                inside.append(None)
                inside[0] = model.generate(input_ids=other, max_new_tokens=2, **GREEDY)

        handle = model.base_model.model.model.layers[1].register_forward_pre_hook(again)
        assert torch.equal(model(input_ids=ids).logits, plain)
        handle.remove()
        assert torch.equal(inside[0], tokens)


@pytest.mark.filterwarnings("ignore:ReFT")
def test_assisted_generation():
    """Drafts by another edited model, by early layers of the same model, and by prompt lookup."""
    model, draft = build(), build("f1+l1")
    ids = prompt(13)
    greedy = {**GREEDY, "eos_token_id": VOCAB - 1}  # assisted generation requires one
    expected = model.generate(input_ids=ids, max_new_tokens=6, **greedy)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(
            model.generate(input_ids=ids, max_new_tokens=6, **options, **greedy), expected
        )


@pytest.mark.filterwarnings("ignore:ReFT")
def test_an_exception_leaves_nothing_behind():
    model = build()
    ids, other = prompt(9), prompt(5)
    expected = model(input_ids=other).logits

    class Stop(Exception):
        pass

    def fail(module, args):
        raise Stop

    handle = model.base_model.model.model.layers[2].register_forward_pre_hook(fail)
    for call in (
        lambda: model(input_ids=ids, prompt_lengths=[3]),
        lambda: model.generate(input_ids=ids, max_new_tokens=2),
    ):
        with pytest.raises(Stop):
            call()
    handle.remove()
    with pytest.raises(ValueError, match="prompt_lengths"):
        model(input_ids=ids, prompt_lengths=[99])
    editor = model.base_model.model.representation_edits.editor
    assert (
        editor.state.call is None and editor.state.generation is None and editor.state.outer == []
    )
    assert all(session.state.frame is None for session in editor.sessions)
    assert torch.equal(model(input_ids=other).logits, expected)


def replica_of(module: torch.nn.Module) -> torch.nn.Module:
    """A replica as in ``nn.DataParallel``: shallow copies that share hooks and attributes."""
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, made in copies.items():
        for name, child in original._modules.items():
            made._modules[name] = copies.get(child)
        for name, parameter in original._parameters.items():
            made._parameters.pop(name, None)
            setattr(made, name, None if parameter is None else parameter.detach().clone())
        for name, buffer in original._buffers.items():
            made._buffers[name] = None if buffer is None else buffer.clone()
    return copies[module]


@pytest.mark.filterwarnings("ignore:ReFT")
def test_replicas_of_data_parallelism():
    """Each replica runs its own modules in its own thread and applies the original's edits."""
    model = build()
    inputs = [prompt(seed) for seed in (3, 11, 16)]
    with torch.no_grad():
        expected = [model(input_ids=ids).logits for ids in inputs]
        replicas = [replica_of(model) for _ in inputs]
        ran = []
        model.base_model.model.model.layers[0].register_forward_pre_hook(lambda m, a: ran.append(m))
        with ThreadPoolExecutor(3) as pool:

            def run(pair):
                with torch.no_grad():
                    return pair[0](input_ids=pair[1]).logits

            got = list(pool.map(run, zip(replicas, inputs, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    original = set(model.modules())
    assert len(ran) == 3 and not any(m in original for m in ran)


# ---- direct calls of forward


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
def test_forward_called_directly(family):
    """``model.forward(...)`` runs no hooks; sentence-transformers and others call it."""
    model = get_peft_model(make(family), ReftConfig(rank=4, positions="f2+l2"))
    shake(model)
    inner, inputs = model.base_model.model, batch(family)
    model.train()
    for module in inner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = []
    for call in (inner, inner.forward, model.forward):
        model.zero_grad()
        out = call(**inputs)
        out.loss.backward()
        grads.append(
            (out.logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad))
        )
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, grads[0], strict=True))
    assert all(float(g.abs().max()) > 0 for g in grads[0])
    if family == "llama":
        backbone = inner.model
        with torch.no_grad():
            want = backbone(inputs["input_ids"], prompt_lengths=[3, 3, 3])[0]
            assert torch.equal(
                backbone.forward(inputs["input_ids"], prompt_lengths=[3, 3, 3])[0], want
            )


def test_forward_is_the_models_own_again_after_unload():
    plain = make("llama")
    model = get_peft_model(plain, ReftConfig(rank=4))
    assert isinstance(plain.__dict__["forward"], InterceptedForward)
    assert model.unload() is plain
    for module in plain.modules():
        assert not {"forward", "generate", "prepare_inputs_for_generation"} & module.__dict__.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:ReFT")
def test_copies_have_a_forward_of_their_own():
    model = build()
    inner = model.base_model.model
    ids = prompt(7)
    for made in (copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
        with torch.no_grad():
            expected = inner.forward(input_ids=ids).logits
            assert torch.equal(made.forward(input_ids=ids).logits, expected)
            made.model.layers[0].mlp.down_proj.weight.zero_()
            assert not torch.equal(made.forward(input_ids=ids).logits, expected)
            assert torch.equal(inner.forward(input_ids=ids).logits, expected)


@pytest.mark.filterwarnings("ignore:ReFT")
def test_accelerates_mixed_precision_wraps_and_unwraps_a_model():
    # another test in this process may have set another precision
    AcceleratorState._reset_state(True)
    plain = make("llama")
    plain.add_adapter(ReftConfig(rank=4, positions="f2+l2"))
    shake(plain)
    ids = prompt(7)
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare_model(plain)
        assert not torch.equal(prepared(input_ids=ids).logits, expected)
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert torch.equal(unwrapped(input_ids=ids).logits, expected)
        assert torch.equal(unwrapped.forward(input_ids=ids).logits, expected)
    AcceleratorState._reset_state(True)
