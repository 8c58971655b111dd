"""Prompt ends in training, scoring and generation, and errors if they are unknown."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import DynamicCache

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import VOCAB, make, mask_of, shake

HEADER = [90, 91, 92]
VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5
SPEC = "f2+l2"


def build(positions: str = SPEC, template=HEADER, **kwargs):
    config = ReftConfig(
        rank=4, positions=positions, response_template=template, task_type="CAUSAL_LM", **kwargs
    )
    model = get_peft_model(make("llama"), config)
    shake(model)
    return model


def chat(prompts=(9, 6, 4), answers=(5, 3, 7), side="right", seed=2):
    """A batch of prompts that end with the header, each followed by an answer.

    Returns:
        Token ids, attention mask, labels that mask the prompts, prompt lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(p + a for p, a in zip(prompts, answers, strict=True))
    mask = mask_of([p + a for p, a in zip(prompts, answers, strict=True)], side, width)
    ids = torch.zeros_like(mask)
    labels = torch.full_like(mask, -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = int(mask[row].argmax())
        text = torch.randint(3, 80, (prompt + answer,), generator=generator)
        text[prompt - 3 : prompt] = torch.tensor(HEADER)
        ids[row, start : start + prompt + answer] = text
        labels[row, start + prompt : start + prompt + answer] = text[prompt:]
    return ids, mask, labels, list(prompts)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("share_weights", [True, False])
def test_the_template_gives_the_same_rows_in_every_path(side, share_weights):
    model = build(share_weights=share_weights).eval()
    ids, mask, labels, lengths = chat(side=side)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = model(input_ids=ids, attention_mask=mask, prompt_lengths=lengths).logits
        for inputs in ({}, {"labels": labels}, {"labels": ids.masked_fill(mask == 0, -100)}):
            assert torch.equal(model(input_ids=ids, attention_mask=mask, **inputs).logits, expected)
            assert torch.equal(
                model.base_model.model.forward(input_ids=ids, attention_mask=mask, **inputs).logits,
                expected,
            )
        frozen = make("llama")(input_ids=ids, attention_mask=mask).logits
        assert not torch.allclose(expected, frozen, atol=1e-3)
    model.train()
    grads = []
    for inputs in ({"labels": labels}, {"labels": labels, "prompt_lengths": lengths}):
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, **inputs).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and all(
        g.abs().max() > 0 for g in grads[0]
    )


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("beams", [1, 3])
def test_the_template_in_generate(chunk, beams):
    """A prefilled answer in the input of ``generate`` does not belong to the prompt."""
    if chunk and beams > 1:
        chunk = None
    model = build().eval()
    ids, mask, _, lengths = chat(side="left")
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "num_beams": beams,
        "return_dict_in_generate": True,
    }
    options |= {"output_logits": True, "eos_token_id": None, "pad_token_id": 0}
    if chunk:
        options["prefill_chunk_size"] = chunk
    got = model.generate(input_ids=ids, attention_mask=mask, **options)
    want = model.generate(input_ids=ids, attention_mask=mask, prompt_lengths=lengths, **options)
    whole = build(template=None).eval().generate(input_ids=ids, attention_mask=mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert not torch.allclose(got.logits[0], whole.logits[0], atol=1e-3)


def test_the_last_of_several_turns_and_alternatives():
    model = build(template=[[70, 71], HEADER]).eval()
    ids, mask, _, _ = chat(prompts=(12,), answers=(4,))
    ids[0, 3:5] = torch.tensor([70, 71])
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids).logits, model(input_ids=ids, prompt_lengths=[12]).logits
        )
        ids[0, 13:15] = torch.tensor([70, 71])
        assert torch.equal(
            model(input_ids=ids).logits, model(input_ids=ids, prompt_lengths=[15]).logits
        )


def test_packed_sequences_by_the_template():
    model = build().eval()
    rows = [chat(prompts=(p,), answers=(a,), seed=p)[0][0] for p, a in ((9, 5), (6, 3), (4, 7))]
    ids = torch.cat(rows).unsqueeze(0)
    position_ids = torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)
    with torch.no_grad():
        got = model(input_ids=ids, position_ids=position_ids).logits
        assert torch.equal(
            got, model(input_ids=ids, position_ids=position_ids, prompt_lengths=[9, 6, 4]).logits
        )
        with pytest.raises(
            ValueError, match="prompt_lengths: got 2 for a packed batch, expected 3"
        ):
            model(input_ids=ids, position_ids=position_ids, prompt_lengths=[9, 6])
        with pytest.raises(ValueError, match="got 15 for example 0, expected 0 to 14"):
            model(input_ids=ids, position_ids=position_ids, prompt_lengths=[15, 6, 4])


def test_the_rule_is_saved(tmp_path):
    model = build().eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path).eval()
    assert loaded.peft_config["default"].response_template == [HEADER]
    ids, mask, _, _ = chat()
    with torch.no_grad():
        assert torch.equal(
            loaded(input_ids=ids, attention_mask=mask).logits,
            model(input_ids=ids, attention_mask=mask).logits,
        )


# ---- batches without prompt ends


def test_labels_that_mask_nothing():
    """With labels = input_ids nothing would be edited, and the loss would be the base model's."""
    model = build(template=None).train()
    ids, mask, labels, _ = chat()
    with pytest.raises(
        ValueError,
        match=r"selects no token to edit.*response_template.*prompt_lengths.*positions='all'",
    ):
        model(input_ids=ids, labels=ids, attention_mask=mask)
    for inputs in ({"labels": labels}, {"labels": ids, "prompt_lengths": [9, 6, 4]}):
        model(input_ids=ids, attention_mask=mask, **inputs).loss.backward()
    model(input_ids=ids, labels=ids, prompt_lengths=[0, 0, 0]).loss.backward()  # explicit
    model(input_ids=ids, labels=ids, edit_positions=torch.full((3, 1), -1)).loss.backward()
    everything = build("all", template=None).train()
    everything(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in everything.parameters() if p.requires_grad)
    model.eval()
    with pytest.warns(UserWarning, match="mask no prompt, so nothing is edited"):
        model(input_ids=ids, labels=ids, attention_mask=mask)


def test_nothing_tells_where_prompts_end():
    model = build(template=None).train()
    ids, mask, _, _ = chat()
    with pytest.raises(
        ValueError,
        match="the training batch has neither labels nor prompt_lengths; give the adapter",
    ):
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), pytest.warns(UserWarning, match="but not for a prompt with its response"):
        model.eval()(input_ids=ids, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids, attention_mask=mask)  # warns only once
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1)


def test_a_template_that_is_not_in_the_text():
    model = build().train()
    ids, mask, labels, lengths = chat()
    ids[1][ids[1] == 91] = 5
    with pytest.raises(
        ValueError, match="response_template: an example of this training batch does not contain it"
    ):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(
        ValueError, match="response_template: an example of this training batch does not contain it"
    ):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    # labels that mask the prompt define its end
    with_labels = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert torch.equal(
        with_labels, model(input_ids=ids, attention_mask=mask, prompt_lengths=lengths).logits
    )
    with pytest.raises(ValueError, match="response_template"):  # embeddings have no token ids
        model(inputs_embeds=model.get_input_embeddings()(ids).detach(), attention_mask=mask)


@pytest.mark.parametrize("template", [None, HEADER])
@pytest.mark.parametrize("training", [True, False])
def test_several_supervised_turns(template, training):
    model = build(template=template).train(training)
    ids, mask, labels, _ = chat(prompts=(6, 9, 7), answers=(8, 4, 5))
    ids[0, 9:12], labels[0, 9:12] = torch.tensor(HEADER), -100
    with pytest.raises(ValueError, match=r"labels: .*expand_turns"):
        model(input_ids=ids, attention_mask=mask, labels=labels)
    model(input_ids=ids, attention_mask=mask, labels=labels, prompt_lengths=[12, 9, 7])
    if template is not None:
        with pytest.raises(ValueError, match="a response before the last one is supervised too"):
            model(input_ids=ids, attention_mask=mask, labels=ids)
        labels[0, :12] = -100
        model(input_ids=ids, attention_mask=mask, labels=labels)


def test_several_supervised_turns_in_a_packed_batch():
    first, _, labels, _ = chat(prompts=(6,), answers=(8,))
    ids = torch.cat([first, first], dim=1)
    position_ids = torch.arange(14).repeat(2).unsqueeze(0)
    labels = torch.cat([labels, labels], dim=1)
    build(template=None).train()(
        input_ids=ids, position_ids=position_ids, labels=labels
    ).loss.backward()
    labels[0, 23] = -100
    for template in (None, HEADER):
        if template:
            ids[0, 21:24] = torch.tensor(HEADER)
        with pytest.raises(ValueError, match="labels: "):
            build(template=template).train()(
                input_ids=ids, position_ids=position_ids, labels=labels
            )


# ---- caches


def texts():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, 80, (2, 7), generator=generator), torch.randint(
        3, 80, (2, 6), generator=generator
    )


def run(model, whole, **kwargs):
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    out = model.generate(input_ids=whole, **options, eos_token_id=None, pad_token_id=0, **kwargs)
    return torch.stack(out.logits)


def test_a_cache_filled_with_a_part_of_the_prompt():
    model = build("f3+l3", template=None).eval()
    system, question = texts()
    whole = torch.cat([system, question], dim=1)
    mask = torch.ones_like(whole)
    expected = run(model, whole, attention_mask=mask)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=system, past_key_values=cache, prompt_lengths=[13, 13])
    # generate takes the whole text; transformers 5 also takes the new tokens with the whole mask
    for inputs in (whole, question) if VERSION_5 else (whole,):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            got = run(model, inputs, attention_mask=mask, past_key_values=copy.deepcopy(cache))
        torch.testing.assert_close(got, expected)
    got = run(
        model,
        whole,
        attention_mask=mask,
        past_key_values=copy.deepcopy(cache),
        prompt_lengths=[13, 13],
    )
    torch.testing.assert_close(got, expected)


def test_a_cache_whose_edits_are_not_the_prompts_is_said():
    model = build("f3+l3", template=None).eval()
    system, question = texts()
    whole = torch.cat([system, question], dim=1)
    mask = torch.ones_like(whole)
    empty = DynamicCache(config=model.config)
    with torch.no_grad():
        stale = model(input_ids=system, past_key_values=copy.deepcopy(empty)).past_key_values
        with model.disable_adapter():
            frozen = model(input_ids=system, past_key_values=copy.deepcopy(empty)).past_key_values
    with pytest.warns(
        UserWarning,
        match=r"past_key_values holds 7 columns.*\(columns 4, 5, 6 of example 0 differ\)",
    ):
        run(model, whole, attention_mask=mask, past_key_values=stale)
    with pytest.warns(UserWarning, match=r"\(columns 0, 1, 2 of example 0 differ\)"):
        run(model, whole, attention_mask=mask, past_key_values=frozen)
    everything = build("all", template=None).eval()
    with torch.no_grad():
        cache = everything(input_ids=system, past_key_values=copy.deepcopy(empty)).past_key_values
    expected = run(everything, whole, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(
            run(everything, whole, attention_mask=mask, past_key_values=cache), expected
        )


def test_a_chat_that_keeps_its_cache_warns():
    model = build("f3+l3", template=None).eval()
    system, question = texts()
    cache = DynamicCache(config=model.config)
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "past_key_values": cache,
    }
    first = model.generate(input_ids=system, attention_mask=torch.ones_like(system), **options)
    second = torch.cat([first, question], dim=1)
    with pytest.warns(UserWarning, match=r"past_key_values holds 9 columns"):
        model.generate(input_ids=second, attention_mask=torch.ones_like(second), **options)


def test_tokens_that_continue_a_cache_outside_of_generate():
    model = build("l2", template=None).eval()
    system, question = texts()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(input_ids=system, past_key_values=cache, prompt_lengths=[13, 13])
        kept = copy.deepcopy(cache)
        with pytest.warns(UserWarning, match="is taken as decoding"):
            model(input_ids=question, past_key_values=cache)
        got = model(input_ids=question, past_key_values=kept, prompt_lengths=[13, 13]).logits
        expected = model(
            input_ids=torch.cat([system, question], dim=1), prompt_lengths=[13, 13]
        ).logits[:, 7:]
    torch.testing.assert_close(got, expected)


# ---- the configuration


@pytest.mark.parametrize(
    "value", ["text", [], [[]], [1, -2], [1.5], [True], ("text",), {"a": 1}, 5, ["a"]], ids=str
)
def test_templates_that_are_none(value):
    with pytest.raises(ValueError, match="response_template: got .*expected token ids"):
        ReftConfig(response_template=value)


def test_encoder_decoders_have_no_template():
    with pytest.raises(ValueError, match="response_template: .*encoder"):
        get_peft_model(make("t5"), ReftConfig(rank=4, response_template=HEADER))


def test_the_vocabulary_bounds_a_template():
    with pytest.raises(
        ValueError, match=f"response_template: got token id {VOCAB}, expected ids below {VOCAB}"
    ):
        get_peft_model(make("llama"), ReftConfig(rank=4, response_template=[VOCAB]))
