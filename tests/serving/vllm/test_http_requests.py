"""Answers over HTTP are those of transformers with PEFT, token for token."""

from __future__ import annotations

import asyncio
import json

import pytest

PROMPTS = ["Name a fruit.", "the answer is yes", "Question: [INST] apple [/INST] Answer:"]
CHOICES = [None, "a", "b", "c", "d"]
COUNT = 12


def _want(site, prompt, name, count=COUNT):
    return site.tokens(prompt, name, count)


@pytest.mark.parametrize("name", CHOICES)
def test_completions_by_model_name_and_by_argument(site, name):
    for prompt in PROMPTS:
        want = _want(site, prompt, name)
        assert site.complete(prompt, name) == [want]
        if name is not None:
            assert site.complete(prompt, vllm_xargs={"reft": name}) == [want]


def test_adapters_change_answers(site):
    answers = {_want(site, PROMPTS[0], name) for name in CHOICES}
    assert len(answers) == len(CHOICES)


def test_all_prompts_of_a_request_are_edited(site):
    want = [_want(site, prompt, "a") for prompt in PROMPTS]
    as_object = json.dumps({"adapter": "a"})
    assert site.complete(PROMPTS, vllm_xargs={"reft": as_object}) == want
    assert site.complete(PROMPTS, "a") == want


def test_the_response_names_the_adapter(site):
    answer = site.client.completions.create(model="a", prompt=PROMPTS[0], max_tokens=2)
    assert answer.model == "a"
    answer = site.client.completions.create(model=site.base, prompt=PROMPTS[0], max_tokens=2)
    assert answer.model == site.base


def _chat(site, name, text, **options):
    return site.client.chat.completions.create(
        model=name or site.base,
        messages=[{"role": "user", "content": text}],
        max_completion_tokens=COUNT,
        temperature=0,
        extra_body={"return_token_ids": True},
        **options,
    )


@pytest.mark.parametrize("name", [None, "b"])
def test_chat(site, name):
    answer = _chat(site, name, "Name a fruit.")
    want = _want(site, site.reference.chat_prompt("Name a fruit."), name)
    assert tuple(answer.choices[0].token_ids) == want and answer.model == (name or site.base)


def _joined(stream):
    """The tokens of a stream."""
    parts = [getattr(e.choices[0], "token_ids", None) or [] for e in stream if e.choices]
    assert len(parts) > 1
    return tuple(token for part in parts for token in part)


@pytest.mark.parametrize("name", [None, "a", "c"])
def test_streams(site, name):
    assert _joined(site.stream(PROMPTS[0], name, COUNT)) == _want(site, PROMPTS[0], name)
    chat = _chat(site, name, "the answer", stream=True)
    assert _joined(chat) == _want(site, site.reference.chat_prompt("the answer"), name)


def test_several_answers_of_one_request(site):
    want = _want(site, PROMPTS[1], "a")
    # vLLM refuses n > 1 without sampling; of the likeliest token alone it is greedy
    assert site.complete(PROMPTS[1], "a", n=3, temperature=1.0, top_k=1) == [want] * 3
    sampled = site.complete(PROMPTS[1], "a", n=3, temperature=1.0, seed=1)
    assert len(sampled) == 3 and len(set(sampled)) > 1
    site.wait_until(lambda: site.requests_of("a") == 0)


def test_stop_tokens(site):
    want = _want(site, PROMPTS[0], "b")
    stop = want[5]
    got = site.complete(PROMPTS[0], "b", stop_token_ids=[stop])
    assert got == [want[: want.index(stop) + 1]]


def test_a_client_that_leaves_ends_its_request(site):
    for _ in range(10):  # on a busy machine an answer can end before its request is counted
        stream = site.stream(PROMPTS[0], "a", 400, ignore_eos=True)
        next(iter(stream))
        counted = site.requests_of("a")
        stream.close()
        if counted:
            break
    assert counted == 1
    site.wait_until(lambda: site.requests_of("a") == 0)
    assert site.complete(PROMPTS[0], "a") == [_want(site, PROMPTS[0], "a")]


def test_coefficients_and_subspaces(site):
    base, edited = (_want(site, PROMPTS[0], name) for name in (None, "a"))

    def answer(**options):
        return site.complete(
            PROMPTS[0], vllm_xargs={"reft": json.dumps({"adapter": "a"} | options)}
        )[0]

    assert answer(coefficient=0) == base and answer(coefficient=1) == edited
    assert answer(subspaces=[0, 1, 2, 3]) == edited
    assert answer(subspaces=[0]) not in (base, edited) and answer(coefficient=0.5) != edited
    assert site.complete(PROMPTS[0], "a", vllm_xargs={"reft": '{"coefficient": 0}'}) == [base]


def test_prefix_caches_do_not_mix_adapters(site):
    prompt = "user assistant model system Answer: Question: " * 12  # several cached blocks
    hits = []
    for name in [None, "a", None, "b", "a", "b"]:
        before = site.metrics()["vllm:prefix_cache_hits_total"]
        assert site.complete(prompt, name) == [_want(site, prompt, name)], name
        hits.append(site.metrics()["vllm:prefix_cache_hits_total"] - before > 0)
    assert hits == [False, False, True, False, True, True]


def test_many_requests_at_a_time(site):
    async def run():
        async with site.async_client() as client:
            return await asyncio.gather(
                *(
                    site.complete_async(client, prompt, name, COUNT)
                    for prompt in PROMPTS
                    for name in CHOICES
                )
            )

    want = [_want(site, prompt, name) for prompt in PROMPTS for name in CHOICES]
    assert asyncio.run(run()) == want


def test_models_lists_adapters_with_their_base(site):
    cards = {card.id: card for card in site.client.models.list().data}
    assert cards["a"].parent == site.base and cards[site.base].parent is None


def test_metrics_count_the_adapters(site):
    before = site.metrics()
    site.complete(PROMPTS[0], "a")
    site.complete(PROMPTS[1], "a")
    after = site.metrics()
    assert after["reft:requests_admitted_total"] == before["reft:requests_admitted_total"] + 2
    assert after["reft:bank_slots"] == site.slots and after["reft:bank_resident"] >= 1
    hits, loads = "reft:bank_hits_total", "reft:bank_loads_total"
    assert after[hits] + after[loads] >= before[hits] + before[loads] + 2
    assert after[hits] > before[hits]
    assert after["reft:adapters"] >= 4 and after["reft:requests_running"] == 0
    assert any(name.startswith("vllm:") for name in after)
