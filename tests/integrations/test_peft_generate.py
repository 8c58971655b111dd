"""``generate``: only the prompt is edited, with padding, prefill chunks and beams."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.families.family import VERSION_5
from tests.model.families import (
    LENGTH,
    VOCAB,
    blocks,
    make,
    mask_of,
    plain_loreft,
    shake,
    stacks,
    within,
)

NEW = 6


def prompts(side: str, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of([LENGTH, 17, 10], side)
    return {
        "input_ids": torch.randint(3, VOCAB, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
    }


def columns_of(mask: torch.Tensor, positions: str) -> list[list[int]]:
    chosen = []
    for row in mask:
        real = row.nonzero().flatten().tolist()
        if positions == "f7+l7":
            n = len(real) // 2
            chosen.append(real[: min(7, n)] + real[len(real) - min(7, n) :])
        elif positions == "l5":
            chosen.append(real[-5:])
        else:
            chosen.append(real)
    return chosen


class Naive:
    """The reference: plain hooks that edit absolute columns and count the columns so far."""

    def __init__(self, family, model, stack, mask, positions, repeats=1):
        self.model, self.columns, self.repeats = model, columns_of(mask, positions), repeats
        self.everything = positions == "all"
        self.cursor = 0
        last = len(blocks(family, model)) - 1
        for layer, block in enumerate(blocks(family, model)):
            weights = stack.R[layer].detach(), stack.W[layer].detach(), stack.b[layer].detach()
            block.register_forward_hook(self._hook(weights, layer == last))

    def _hook(self, weights, is_last):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            width = hidden.shape[1]
            here = range(self.cursor, self.cursor + width)
            columns = [c for c in self.columns for _ in range(self.repeats)]
            if self.everything:  # all real tokens of the prompt and all generated tokens
                end = max(map(max, columns))
                columns = [
                    [c - here.start for c in here if c in chosen or c > end] for chosen in columns
                ]
            else:
                columns = [[c - here.start for c in chosen if c in here] for chosen in columns]
            if is_last:
                self.cursor += width
            edited = plain_loreft(hidden, columns, *(w.to(hidden.dtype) for w in weights))
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook


def adapted(family, positions):
    model = get_peft_model(
        make(family), ReftConfig(rank=4, positions=positions, task_type="CAUSAL_LM")
    ).eval()
    shake(model, 0.5)
    return model


def naive(family, model, inputs, positions, repeats):
    plain = make(family)
    Naive(family, plain, stacks(model)[0], inputs["attention_mask"], positions, repeats)
    return plain


SETTINGS = {
    "greedy": {},
    "chunked": {"prefill_chunk_size": 5},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "no_cache": {"use_cache": False},
}


def combinations():
    """All settings for Llama; for other families, those that depend on the family.

    Right padding with positions "all" is left out: which columns are edited depends on the model.
    """
    for side in ("left", "right"):
        for setting in (n for n in SETTINGS if n != "no_cache"):
            for positions in ("f7+l7", "l5", "prompt", "all"):
                if not (positions == "all" and side == "right"):
                    yield "llama", side, positions, setting
        for family in ("gpt2", "bloom"):
            for setting in ("greedy", "beams"):
                for positions in ("f7+l7", "prompt"):
                    yield family, side, positions, setting


@pytest.mark.parametrize(("family", "side", "positions", "setting"), combinations())
def test_generates_what_naive_hooks_generate(family, side, positions, setting):
    inputs = prompts(side)
    options = {"max_new_tokens": NEW, "do_sample": False, **SETTINGS[setting]}
    repeats = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    model = adapted(family, positions)
    subjects = [
        model,
        naive(family, model, inputs, positions, repeats),
        naive(family, model, inputs, positions, repeats),
    ]
    subjects[2].double()
    results = []
    for subject in subjects:
        torch.manual_seed(11)
        results.append(
            subject.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    # Bloom in fp64 gives NaN with left padding
    if torch.equal(results[0].sequences, results[2].sequences) and family != "bloom":
        for got, plain, exact in zip(*(r.logits for r in results), strict=True):
            assert within(got, plain, exact)


def test_edits_change_what_is_generated():
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    edited = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    with model.disable_adapter():
        assert not torch.equal(
            model.generate(**inputs, max_new_tokens=NEW, do_sample=False), edited
        )


@pytest.mark.parametrize("setting", ["no_cache", "chunked"])
@pytest.mark.parametrize("positions", ["f7+l7", "l5"])
def test_without_a_cache_or_in_chunks_the_tokens_are_those_with_one(setting, positions):
    inputs = prompts("left")
    model = adapted("llama", positions)
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **SETTINGS[setting]), expected
    )


def test_a_missing_mask_is_inferred_from_padding_as_transformers_does():
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    got = model.generate(
        input_ids=inputs["input_ids"], max_new_tokens=NEW, do_sample=False, prefill_chunk_size=5
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk", [1, 5, 64])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", ["f7+l7", "l1", "all"])
def test_prompts_without_padding_in_chunks(positions, masked, chunk):
    """transformers passes no mask then, so that only the cache tells a chunk's columns."""
    ids = prompts("left")["input_ids"].clamp(min=3)
    inputs = {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {})
    model = adapted("llama", positions)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True}
    expected = model.generate(**inputs, **options)
    got = model.generate(**inputs, prefill_chunk_size=chunk, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    not VERSION_5, reason="transformers 4 itself continues a cache otherwise in chunks"
)
def test_a_continued_cache_in_chunks():
    """The second turn starts from a filled cache; its chunks follow the cached columns."""
    ids = prompts("left")["input_ids"].clamp(min=3)
    model = adapted("llama", "l7")
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    found = []
    for chunk in (None, 4):
        with model.disable_adapter():
            first = model.generate(input_ids=ids, **options)
        turn = torch.cat([first.sequences, ids[:, :9]], dim=1)
        cache = first.past_key_values
        found.append(
            model.generate(
                input_ids=turn,
                attention_mask=torch.ones_like(turn),
                past_key_values=cache,
                prefill_chunk_size=chunk,
                **options,
            ).sequences
        )
    assert torch.equal(*found)


def test_static_cache_and_embeddings_as_input():
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    static = model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(static, expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    got = model.generate(
        inputs_embeds=embeds,
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW,
        do_sample=False,
    )
    assert torch.equal(got, expected[:, LENGTH:])


def test_an_explicit_prompt_length_beats_the_mask():
    inputs = prompts("left")
    model = adapted("llama", "l5")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    whole = model.generate(
        **inputs, prompt_lengths=[24, 17, 10], max_new_tokens=NEW, do_sample=False
    )
    less = model.generate(
        **inputs, prompt_lengths=torch.tensor([12, 9, 6]), max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(whole, expected) and not torch.equal(less, expected)
    columns = torch.tensor([[19, 20, 21, 22, 23]] * 3)
    assert torch.equal(
        model.generate(**inputs, edit_positions=columns, max_new_tokens=NEW, do_sample=False),
        expected,
    )
    chunked = model.generate(
        **inputs, edit_positions=columns, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=7
    )
    assert torch.equal(chunked, expected)


def test_decoding_steps_edit_nothing_and_build_nothing(monkeypatch):
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    (stack,) = stacks(model)
    edits, builds = [], []
    edit, build = stack.edit, type(stack).build
    monkeypatch.setattr(stack, "edit", lambda *a, **k: edits.append(1) or edit(*a, **k))
    monkeypatch.setattr(type(stack), "build", lambda self: builds.append(1) or build(self))
    model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert len(edits) == len(blocks("llama", model.base_model.model))
    assert len(builds) == 1


def test_a_hand_written_loop_with_a_cache_edits_the_prompt_alone():
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    ids, mask, tokens, cache = (
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["input_ids"],
        None,
    )
    with torch.no_grad():
        for _ in range(NEW):
            positions = (
                (mask.cumsum(1) - 1).clamp(min=1)[:, -tokens.shape[1] :]
                if cache is not None
                else None
            )
            positions = (
                (mask.cumsum(1) - 1).masked_fill(mask == 0, 1) if cache is None else positions
            )
            out = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, mask.new_ones(3, 1)], 1)
    stopped = (expected == 0).cumsum(1) > 0
    assert torch.equal(ids[:, : expected.shape[1]][~stopped], expected[~stopped])


def test_t5_edits_its_encoder_and_when_asked_its_decoders_prompt():
    inputs = prompts("right")
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    frozen = make("t5").generate(**inputs, **options)
    for component in ("block_output", "decoder.block_output"):
        model = get_peft_model(
            make("t5"),
            ReftConfig(rank=4, component=component, positions="f1", task_type="SEQ_2_SEQ_LM"),
        )
        shake(model, 1.0)
        cached = model.eval().generate(**inputs, **options)
        again = model.generate(**inputs, **options, use_cache=False)
        assert torch.equal(cached.sequences, again.sequences)
        for with_cache, without in zip(cached.logits, again.logits, strict=True):
            torch.testing.assert_close(with_cache, without)
        assert not torch.allclose(cached.logits[0], frozen.logits[0])


def test_a_copied_model_generates_by_itself():
    inputs = prompts("left")
    model = adapted("llama", "f7+l7")
    expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    other = copy.deepcopy(model)
    assert torch.equal(other.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    with torch.no_grad():
        for parameter in stacks(model)[0].parameters():
            parameter.zero_()
    assert torch.equal(other.generate(**inputs, max_new_tokens=NEW, do_sample=False), expected)
    bare = other.unload()
    with model.disable_adapter():
        frozen = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(bare.generate(**inputs, max_new_tokens=NEW, do_sample=False), frozen)
