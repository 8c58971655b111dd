"""Many clients with random adapters, while adapters are loaded, replaced and unloaded."""

from __future__ import annotations

import asyncio
import collections
import random

import pytest

PROMPTS = ["Name a fruit.", "the answer is yes", "An apple.", "Question: user Answer:"]
CLIENTS, REQUESTS, COUNT, WARM_UP = 16, 500, 6, 100
EACH = 10  # requests for each adapter that is loaded or unloaded
GROWTH_KIB = 4 * 1024  # over 400 requests and 40 changes, 10 KiB a request


@pytest.fixture
def folders(site):
    """Two adapters of the root for each changing name."""
    from tests.serving.vllm.http_models import save_adapter

    pairs = {}
    for number in range(4):
        pairs[f"changing{number}"] = [f"changing{number}{part}" for part in "xy"]
        for seed, folder in enumerate(pairs[f"changing{number}"], 200 + 2 * number):
            if not (site.root / folder).exists():
                save_adapter(site.model, site.root / folder, seed, positions="f2+l1")
    return pairs


def compute_every_size(site) -> None:
    """Let the engine compute a step of each number of tokens and of sequences that it will meet.

    vLLM on the CPU keeps oneDNN's kernels for each number of rows, more than 1 MiB for each.
    """
    longest = max(len(site.reference.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    vocabulary = len(site.reference.tokenizer)
    for rows in range(1, CLIENTS * longest + 1):
        site.complete([rows % vocabulary] * rows, count=1)
    for sequences in range(1, CLIENTS + 1):
        site.complete([[token] for token in range(sequences)], count=3, ignore_eos=True)


def test_every_answer_is_of_its_adapter_or_a_404(site, folders):
    import openai

    fixed = [None, "a", "b", "c", "d"]
    # a changing name may have either of its folders when a request is admitted
    expected = {
        (name, prompt): {site.tokens(prompt, folder, COUNT) for folder in folders.get(name, [name])}
        for name in [*fixed, *folders]
        for prompt in PROMPTS
    }
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    memory: list[int] = []
    chance = random.Random(0)
    work = [(chance.choice([*fixed, *folders]), chance.choice(PROMPTS)) for _ in range(REQUESTS)]
    queue = iter(work)

    def finished() -> int:
        return counts["answered"] + counts["not found"]

    async def ask(client: openai.AsyncOpenAI) -> None:
        for name, prompt in queue:
            # neither side runs away from the other on a slow machine
            while finished() > EACH * counts["changes"] + 2 * CLIENTS:
                await asyncio.sleep(0.005)
            try:
                answer = await site.complete_async(client, prompt, name, COUNT)
            except openai.NotFoundError:
                counts["not found"] += 1
                if name not in folders:
                    wrong.append(f"{name}: 404")
            else:
                counts["answered"] += 1
                if answer not in expected[name, prompt]:
                    wrong.append(f"{name}, {prompt}: {answer}")
            if finished() in (WARM_UP, REQUESTS):
                memory.append(await asyncio.to_thread(site.server.resident_kib))

    async def change(client: openai.AsyncOpenAI) -> None:
        loaded: set[str] = set()
        for number in range(REQUESTS // EACH):
            while finished() < EACH * number:
                await asyncio.sleep(0.005)
            if loaded and number % 5 > 2:
                name = chance.choice(sorted(loaded))
                loaded.remove(name)
                await client.post("/reft/unload", body={"name": name}, cast_to=object)
                counts["unloads"] += 1
            else:
                name = chance.choice(list(folders))
                loaded.add(name)
                body = {"name": name, "path": chance.choice(folders[name])}
                await client.post("/reft/load", body=body, cast_to=object)
                counts["loads"] += 1
            counts["changes"] += 1

    compute_every_size(site)

    async def run() -> None:
        async with site.async_client() as client:
            await asyncio.gather(change(client), *(ask(client) for _ in range(CLIENTS)))

    asyncio.run(run())
    assert not wrong, wrong[:5]
    assert counts["answered"] + counts["not found"] == REQUESTS
    assert counts["not found"] and counts["answered"] > REQUESTS / 2
    assert counts["changes"] == REQUESTS // EACH and counts["unloads"] > counts["changes"] // 5
    before, after = memory[0], memory[-1]
    assert after - before < GROWTH_KIB, f"{before} KiB, then {after} KiB"
    site.still_serves()
    # what is neither named nor used is gone from the engine
    site.wait_until(lambda: all(one["named"] for one in site.adapters()))
    assert all(one["requests"] == 0 for one in site.adapters())
