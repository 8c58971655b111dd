"""Answers over HTTP are those of transformers with PEFT, token for token."""

from __future__ import annotations

import asyncio
import json

import pytest

PROMPTS = ["Name a fruit.", "the answer is yes", "Question: [INST] apple [/INST] Answer:"]
CHOICES = [None, "a", "b", "c", "d"]
COUNT = 12


def _complete(site, prompt, **options):
    options = {"max_tokens": COUNT, "temperature": 0} | options
    return site.client.completions.create(prompt=prompt, **options)


def _tokens(site, prompt, **options):
    extra = {"return_token_ids": True} | options.pop("extra_body", {})
    answer = _complete(site, prompt, extra_body=extra, **options)
    return [tuple(choice.token_ids) for choice in answer.choices]


@pytest.mark.parametrize("name", CHOICES)
def test_completions_by_model_name_and_by_argument(site, name):
    for prompt in PROMPTS:
        want = site.tokens(prompt, name, COUNT)
        assert _tokens(site, prompt, model=name or site.base) == [want]
        if name is not None:
            extra = {"vllm_xargs": {"reft": name}}
            assert _tokens(site, prompt, model=site.base, extra_body=extra) == [want]


def test_adapters_change_answers(site):
    answers = {site.tokens(PROMPTS[0], name, COUNT) for name in CHOICES}
    assert len(answers) == len(CHOICES)


def test_all_prompts_of_a_request_are_edited(site):
    want = [site.tokens(prompt, "a", COUNT) for prompt in PROMPTS]
    extra = {"vllm_xargs": {"reft": json.dumps({"adapter": "a"})}}
    assert _tokens(site, PROMPTS, model=site.base, extra_body=extra) == want
    assert _tokens(site, PROMPTS, model="a") == want


def test_the_response_names_the_adapter(site):
    answer = _complete(site, PROMPTS[0], model="a")
    assert answer.model == "a" and answer.choices[0].text == site.text(PROMPTS[0], "a", COUNT)


@pytest.mark.parametrize("name", [None, "b"])
def test_chat(site, name):
    answer = site.client.chat.completions.create(
        model=name or site.base,
        messages=[{"role": "user", "content": "Name a fruit."}],
        max_completion_tokens=COUNT,
        temperature=0,
    )
    prompt = site.reference.chat_prompt("Name a fruit.")
    assert answer.choices[0].message.content == site.text(prompt, name, COUNT)
    assert answer.model == (name or site.base)


@pytest.mark.parametrize("name", [None, "a", "c"])
def test_streams(site, name):
    stream = _complete(site, PROMPTS[0], model=name or site.base, stream=True)
    assert "".join(event.choices[0].text for event in stream) == site.text(PROMPTS[0], name, COUNT)
    chat = site.client.chat.completions.create(
        model=name or site.base,
        messages=[{"role": "user", "content": "the answer"}],
        max_completion_tokens=COUNT,
        temperature=0,
        stream=True,
    )
    parts = [event.choices[0].delta.content or "" for event in chat if event.choices]
    prompt = site.reference.chat_prompt("the answer")
    assert "".join(parts) == site.text(prompt, name, COUNT)


def test_several_answers_of_one_request(site):
    want = site.tokens(PROMPTS[1], "a", COUNT)
    assert _tokens(site, PROMPTS[1], model="a", n=3) == [want] * 3
    sampled = _tokens(site, PROMPTS[1], model="a", n=3, temperature=1.0, seed=1)
    assert len(sampled) == 3 and len(set(sampled)) > 1
    assert site.requests_of("a") == 0


def test_stop_strings(site):
    whole = site.text(PROMPTS[0], "b", COUNT)
    stop = whole[len(whole) // 2 :][:2]
    answer = _complete(site, PROMPTS[0], model="b", stop=[stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_client_that_leaves_ends_its_request(site):
    stream = _complete(
        site, PROMPTS[0], model="a", stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert site.requests_of("a") == 1
    stream.close()
    site.wait_until(lambda: site.requests_of("a") == 0)
    assert _tokens(site, PROMPTS[0], model="a") == [site.tokens(PROMPTS[0], "a", COUNT)]


def test_coefficients_and_subspaces(site):
    base, edited = (site.tokens(PROMPTS[0], name, COUNT) for name in (None, "a"))

    def answer(**options):
        extra = {"vllm_xargs": {"reft": json.dumps({"adapter": "a"} | options)}}
        return _tokens(site, PROMPTS[0], model=site.base, extra_body=extra)[0]

    assert answer(coefficient=0) == base and answer(coefficient=1) == edited
    assert answer(subspaces=[0, 1, 2, 3]) == edited
    assert answer(subspaces=[0]) not in (base, edited) and answer(coefficient=0.5) != edited
    by_model = {"vllm_xargs": {"reft": '{"coefficient": 0}'}}
    assert _tokens(site, PROMPTS[0], model="a", extra_body=by_model) == [base]


def test_prefix_caches_do_not_mix_adapters(site):
    prompt = "user assistant model system Answer: Question: " * 3
    for name in [None, "a", None, "b", "a", "b"]:
        got = _tokens(site, prompt, model=name or site.base)
        assert got == [site.tokens(prompt, name, COUNT)], name


def test_many_requests_at_a_time(site):
    async def run():
        async with site.async_client() as client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(
                        model=name or site.base, prompt=prompt, max_tokens=COUNT, temperature=0
                    )
                    for prompt in PROMPTS
                    for name in CHOICES
                )
            )
        return [answer.choices[0].text for answer in answers]

    want = [site.text(prompt, name, COUNT) for prompt in PROMPTS for name in CHOICES]
    assert asyncio.run(run()) == want


def test_models_lists_adapters_with_their_base(site):
    cards = {card.id: card for card in site.client.models.list().data}
    assert cards["a"].parent == site.base and cards[site.base].parent is None


def test_metrics_count_the_adapters(site):
    before = site.metrics()
    _complete(site, PROMPTS[0], model="a")
    after = site.metrics()
    assert after["reft:requests_admitted_total"] == before["reft:requests_admitted_total"] + 1
    assert after["reft:bank_slots"] == site.slots and after["reft:bank_resident"] >= 1
    hits, loads = "reft:bank_hits_total", "reft:bank_loads_total"
    assert after[hits] + after[loads] == before[hits] + before[loads] + 1
    assert after["reft:adapters"] >= 4 and after["reft:requests_running"] == 0
    assert any(name.startswith("vllm:") for name in after)
