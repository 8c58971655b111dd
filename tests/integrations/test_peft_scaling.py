"""The arguments ``subspaces`` and ``strengths``: part of an edit, for each example."""

from __future__ import annotations

import contextlib

import pytest
import torch

from reft_kernels.integrations.peft import ReftConfig
from reft_kernels.model.scaling import Scaling
from tests.families.family import VERSION_5
from tests.integrations.scaling import (
    STRENGTHS,
    SUBSPACES,
    build,
    expected,
    logits,
    table,
    tokens_of,
)
from tests.model.families import VOCAB, batch, mask_of, prompt_columns, shake, stacks, within

NEW = 5


@pytest.mark.parametrize(
    ("family", "side"),
    [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt2", "right"), ("bert", "right")],
)
def test_values_are_those_of_plain_hooks(family, side):
    model, inputs = build(family, positions="f3+l2"), tokens_of(family, side)
    columns = prompt_columns(family, inputs, 3, 2, 24)
    got = logits(model, inputs, subspaces=SUBSPACES, strengths=STRENGTHS)
    assert within(got, *expected(family, model, inputs, columns, table(SUBSPACES, STRENGTHS)))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize(
    "name", ["loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "red"]
)
def test_every_member(name, untied):
    model = build(intervention=name, positions="f3+l3", share_weights=not untied)
    inputs = tokens_of()
    columns = prompt_columns("llama", inputs, 3, 3, 24)
    subspaces = None if name == "red" else SUBSPACES
    first = 3 if untied else 0
    for call in ({"strengths": STRENGTHS}, {"strengths": STRENGTHS, "subspaces": subspaces}):
        coeff = table(call.get("subspaces"), STRENGTHS)
        got = logits(model, inputs, **call)
        assert within(got, *expected("llama", model, inputs, columns, coeff, first))
    one = logits(model, inputs, strengths=-0.5)
    assert within(one, *expected("llama", model, inputs, columns, table(None, [-0.5] * 3), first))
    assert torch.equal(logits(model, inputs, strengths=[1, 1.0, 1]), logits(model, inputs))


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit"])
@pytest.mark.parametrize("kind", ["loreft", "red"])
def test_one_is_the_adapter_and_zero_the_frozen_model(family, kind):
    model, inputs = build(family, intervention=kind, positions="f2+l2"), tokens_of(family)
    adapted = logits(model, inputs)
    with model.disable_adapter():
        frozen = logits(model, inputs)
    for ones in (1, 1.0, [1, 1, 1], torch.ones(3), torch.tensor(1)):
        assert torch.equal(logits(model, inputs, strengths=ones), adapted)
    for zeros in (0, [0.0, 0.0, 0.0], torch.zeros(3, dtype=torch.int64)):
        torch.testing.assert_close(logits(model, inputs, strengths=zeros), frozen)
    mixed = logits(model, inputs, strengths=[0, 1, 0])
    assert torch.equal(mixed[1], adapted[1])
    torch.testing.assert_close(mixed[0], frozen[0])
    if kind == "red":
        return
    for whole in ([0, 1, 2, 3], [None] * 3, [[3, 2, 1, 0], None, [0, 1, 2, 3]]):
        assert torch.equal(logits(model, inputs, subspaces=whole), adapted)
    torch.testing.assert_close(logits(model, inputs, subspaces=[]), frozen)
    part = logits(model, inputs, subspaces=[[], [1], None])
    torch.testing.assert_close(part[0], frozen[0])
    assert torch.equal(part[2], adapted[2]) and not torch.allclose(part[1], adapted[1])


def test_forms_of_the_arguments():
    model, inputs = build(), tokens_of()
    want = logits(model, inputs, subspaces=[[0, 2], [], [3]], strengths=[2, 2, 2])
    padded = torch.tensor([[0, 2], [-1, -1], [3, -1]])
    assert torch.equal(logits(model, inputs, subspaces=padded, strengths=2), want)
    same = logits(model, inputs, subspaces=torch.tensor([1, 2]))
    assert torch.equal(logits(model, inputs, subspaces=([1, 2], (2, 1), [1, 2])), same)


@pytest.mark.parametrize("component", ["block_output", "mlp_output", "attention_input"])
@pytest.mark.parametrize("positions", ["all", "f2+l2"])
def test_packed_rows_are_those_of_single_sequences(component, positions):
    model = build(component=component, positions=positions)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (1, 17), generator=generator)
    place = torch.cat([torch.arange(n) for n in (8, 5, 4)])[None]
    lengths = [6, 5, 3]
    got = logits(
        model,
        {"input_ids": ids, "position_ids": place},
        prompt_lengths=lengths,
        subspaces=SUBSPACES,
        strengths=STRENGTHS,
        use_cache=False,  # with a cache, transformers does not separate the sequences
    )
    for number, part in enumerate(ids.split([8, 5, 4], dim=1)):
        call = {"subspaces": [SUBSPACES[number]], "strengths": [STRENGTHS[number]]}
        want = logits(model, {"input_ids": part}, prompt_lengths=[lengths[number]], **call)
        start = sum((8, 5, 4)[:number])
        torch.testing.assert_close(got[:, start : start + part.shape[1]], want)
    with pytest.raises(ValueError, match="strengths: got 2 entries, expected 3"):
        model(input_ids=ids, position_ids=place, prompt_lengths=lengths, strengths=[1, 2])


# ---- generation


def prompts(side="left"):
    generator = torch.Generator().manual_seed(5)
    mask = mask_of([24, 17, 10], side)
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


OPTIONS = {
    "greedy": {},
    "chunked": {"prefill_chunk_size": 5},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("positions", ["f3+l3", "all"])
def test_generates_for_each_example_what_it_generates_alone(option, positions):
    if option == "chunked" and not VERSION_5:
        pytest.skip("transformers 4 counts the positions of chunks from the padding")
    model, inputs = build(positions=positions), prompts()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **OPTIONS[option]}
    call = {"subspaces": SUBSPACES, "strengths": STRENGTHS}

    def run(rows, **more):
        torch.manual_seed(11)
        some = {k: v[rows] for k, v in inputs.items()}
        made = model.generate(
            **some, **options, **more, return_dict_in_generate=True, output_logits=True
        )
        return made.sequences, made.logits

    tokens, scores = run([0, 1, 2], **call)
    options.pop("prefill_chunk_size", None)
    repeats = options.get("num_return_sequences", 1)
    if option == "sampled":  # draws depend on the batch: the first step's distribution does not
        repeated = [x for x in (0, 1, 2) for _ in range(repeats)]
        for row, example in enumerate(repeated):
            alone = run([example], subspaces=[SUBSPACES[example]], strengths=STRENGTHS[example])
            torch.testing.assert_close(scores[0][row], alone[1][0][0])
        return
    for row in range(3):
        alone, _ = run([row], subspaces=SUBSPACES[row], strengths=STRENGTHS[row])
        width = alone.shape[1]
        assert torch.equal(tokens[row, :width], alone[0])
    assert not torch.equal(tokens[:, -NEW:], run([0, 1, 2])[0][:, -NEW:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_gives_what_the_whole_forward_gives(side):
    model, inputs = build(positions="f3+l3"), prompts(side)
    call = {"subspaces": SUBSPACES, "strengths": STRENGTHS}
    made = model.generate(
        **inputs,
        **call,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.int64)], dim=1)
    whole = {"input_ids": made.sequences, "attention_mask": mask}
    got = logits(model, whole, prompt_lengths=[24, 17, 10], **call)
    steps = torch.stack(made.logits, dim=1)
    if side == "right":  # transformers continues after the padding, whose positions differ
        steps, got = steps[:1], got[:1]
    torch.testing.assert_close(got[:, 23:-1], steps, rtol=1e-4, atol=1e-4)


def test_decoding_steps_do_not_read_the_arguments(monkeypatch):
    calls = []
    coefficients = Scaling.coefficients
    monkeypatch.setattr(
        Scaling, "coefficients", lambda self, *args: calls.append(1) or coefficients(self, *args)
    )
    build().generate(**prompts(), strengths=[1, 2, 3], max_new_tokens=NEW, do_sample=False)
    assert len(calls) == 1


def test_encoder_decoder_models():
    for component in ("encoder.block_output", "decoder.block_output"):
        model = build("t5", component=component, positions="f1", task_type="SEQ_2_SEQ_LM")
        inputs = {k: v for k, v in batch("t5").items() if k != "labels"}
        options = {"max_new_tokens": NEW, "do_sample": False}
        for more in ({}, {"num_beams": 2}):
            got = model.generate(
                **inputs, **options, **more, subspaces=SUBSPACES, strengths=STRENGTHS
            )
            for row in range(3):
                some = {k: v[[row]] for k, v in inputs.items()}
                alone = model.generate(
                    **some, **options, **more, subspaces=SUBSPACES[row], strengths=STRENGTHS[row]
                )
                assert torch.equal(got[row, : alone.shape[1]], alone[0])


# ---- several adapters


def several():
    model = build(positions="f2+l2")
    model.add_adapter("small", ReftConfig(rank=2, positions="f2+l2"))
    model.add_adapter("untied", ReftConfig(rank=6, positions="f3+l3", share_weights=False))
    model.add_adapter("red", ReftConfig(intervention="red", positions="l2"))
    for name in ("small", "untied", "red"):
        model.set_adapter(name)
        shake(model, 0.5, seed=len(name))
    return model.eval()


@pytest.mark.parametrize("names", [["untied", "small", "default"], ["red", "__base__", "small"]])
def test_columns_are_those_of_each_examples_adapter(names):
    model, inputs = several(), tokens_of()
    subspaces = {"untied": [5, 0], "small": [1], "default": [3, 1], "red": None, "__base__": [9]}
    call = {"subspaces": [subspaces[name] for name in names], "strengths": STRENGTHS}
    got = logits(model, inputs, adapter_names=names, **call)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = logits(model, inputs)
        else:
            model.set_adapter(name)
            one = None if subspaces[name] is None else [subspaces[name]] * 3
            want = logits(model, inputs, subspaces=one, strengths=STRENGTHS[row])
        torch.testing.assert_close(got[row], want[row])
    made = model.generate(
        **inputs,
        **call,
        adapter_names=names,
        max_new_tokens=2,
        num_beams=2,
        pad_token_id=0,
        do_sample=False,
    )
    assert made.shape == (3, 26)


def test_columns_that_an_adapter_does_not_have():
    model, inputs = several(), tokens_of()
    names = ["untied", "small", "default"]
    for subspaces in ([[5], [2], [3]], [5]):
        with pytest.raises(ValueError, match="below [24], the rank of adapter '(small|default)'"):
            model(**inputs, adapter_names=names, subspaces=subspaces)
    with pytest.raises(ValueError, match="adapter 'red', expected None: RED has no subspace"):
        model(**inputs, adapter_names=["red", "small", "small"], subspaces=[0])


def test_adapters_that_are_active_together_have_one_scale():
    model, inputs = several(), tokens_of()
    model.base_model.set_adapter(["default", "red"])
    with model.disable_adapter():
        frozen = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs, strengths=[0, 0, 0]), frozen)
    assert not torch.allclose(logits(model, inputs, strengths=[0, 1, 0])[1], frozen[1])


# ---- compiled models


@pytest.mark.parametrize("kind", ["loreft", "red"])
def test_compiles_without_recompiling_for_other_tensors(kind):
    torch._dynamo.reset()
    model, inputs = build(intervention=kind, layers=[1]), batch("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    try:
        for number in range(2):
            call = {"strengths": torch.tensor(STRENGTHS) + number}
            if kind == "loreft":
                call["subspaces"] = torch.tensor([[0, 2], [1, -1], [number, 3]])
            guard = torch._dynamo.config.patch(error_on_recompile=True)
            with guard if number else contextlib.nullcontext():
                got = logits(compiled, inputs, **call)
            torch.testing.assert_close(got, logits(model, inputs, **call))
    finally:
        torch._dynamo.reset()


# ---- bad input


BAD = [
    ({"strengths": [1.0]}, ValueError, "strengths: got 1 entries, expected 3"),
    ({"strengths": torch.ones(2)}, ValueError, "strengths: got 2 entries, expected 3"),
    ({"strengths": torch.ones(3, 1)}, ValueError, "strengths: got shape"),
    ({"strengths": torch.ones(3, dtype=torch.bool)}, ValueError, "strengths: got shape"),
    ({"strengths": float("nan")}, ValueError, "strengths: got nan, expected finite"),
    ({"strengths": [0, float("inf"), 1]}, ValueError, "strengths: got inf, expected finite"),
    ({"strengths": torch.tensor([0, float("inf"), 1])}, ValueError, "expected finite numbers"),
    ({"strengths": "1"}, TypeError, "strengths: got str '1', expected a number"),
    ({"strengths": True}, TypeError, "strengths: got bool True"),
    ({"strengths": [1, None, 1]}, TypeError, "strengths: got NoneType"),
    ({"subspaces": [[0], [1]]}, ValueError, "subspaces: got 2 entries, expected 3"),
    ({"subspaces": [4]}, ValueError, "subspaces: got column 4, expected columns below 4"),
    ({"subspaces": [[0], None, [7, 1]]}, ValueError, "subspaces: got column 7"),
    ({"subspaces": [-1]}, ValueError, "subspaces: got column -1, expected at least 0"),
    ({"subspaces": [1, 2, 1]}, ValueError, r"subspaces: got \[1, 2, 1\], expected each column"),
    ({"subspaces": [[0], 1, [2]]}, TypeError, "subspaces: got int 1 among the examples' entries"),
    ({"subspaces": [0.5]}, TypeError, "subspaces: got float 0.5, expected integer columns"),
    ({"subspaces": [True]}, TypeError, "subspaces: got bool True"),
    ({"subspaces": 3}, TypeError, "subspaces: got int 3, expected a list of columns"),
    ({"subspaces": torch.tensor([0.5])}, ValueError, "subspaces: got shape"),
    ({"subspaces": torch.tensor([[4], [0], [0]])}, ValueError, "subspaces: got column 4"),
    ({"subspaces": torch.tensor([1, 1])}, ValueError, r"subspaces: got \[1, 1\]"),
]


def test_bad_values_are_refused_before_anything_is_edited(monkeypatch):
    model, inputs = build(), tokens_of()
    (stack,) = stacks(model)
    monkeypatch.setattr(stack, "edit", lambda *args, **kwargs: pytest.fail("edited"))
    for call, error, message in BAD:
        with pytest.raises(error, match=message):
            model(**inputs, **call)
        with pytest.raises(error, match=message):
            model.generate(**inputs, **call, max_new_tokens=1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="RED has no subspace"):
        build(intervention="red")(**inputs, subspaces=[0])
    assert torch.equal(logits(model, inputs, strengths=[1, 1, 1]), logits(model, inputs))


def test_generation_counts_the_prompts_and_not_the_beams():
    model, inputs = build(), prompts()
    with pytest.raises(ValueError, match="strengths: got 6 entries, expected 3"):
        model.generate(**inputs, strengths=[1, 2] * 3, num_beams=2, max_new_tokens=1)
