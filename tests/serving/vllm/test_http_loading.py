"""Adapters are loaded, replaced and unloaded over HTTP while the server runs."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPT, COUNT = "Name a fruit.", 12


def _text(site, model, count=COUNT, **options):
    answer = site.client.completions.create(
        model=model, prompt=PROMPT, max_tokens=count, temperature=0, **options
    )
    return answer.choices[0].text


@pytest.fixture
def spare(site):
    """Two adapter folders of the root that no test has loaded, and no name left after the test."""
    from tests.serving.vllm.http_models import save_adapter

    for seed, name in enumerate(("spare1", "spare2"), 100):
        if not (site.root / name).exists():
            save_adapter(site.model, site.root / name, seed, positions="f2")
    yield "spare1", "spare2"
    for one in site.adapters():
        if one["named"] and one["name"].startswith("spare"):
            site.post("/reft/unload", name=one["name"])
    site.wait_until(lambda: not any(one["name"].startswith("spare") for one in site.adapters()))


def _not_found():
    import openai

    return pytest.raises(openai.NotFoundError)


def test_loading_listing_and_unloading(site, spare):
    with _not_found():
        _text(site, "spare1")
    loaded = site.post("/reft/load", name="spare1")
    assert loaded["name"] == "spare1" and loaded["rank"] == 4 and loaded["positions"] == "f2"
    assert _text(site, "spare1") == site.text(PROMPT, "spare1", COUNT)
    (listed,) = [one for one in site.adapters() if one["name"] == "spare1"]
    assert listed["hash"] == loaded["hash"] and listed["layers"] == [0, 1, 2, 3]
    assert listed["resident"] and listed["named"] and listed["requests"] == 0
    assert "spare1" in {card.id for card in site.client.models.list().data}
    assert site.post("/reft/unload", name="spare1") == {"name": "spare1", "requests": 0}
    with _not_found():
        _text(site, "spare1")
    assert "spare1" not in {card.id for card in site.client.models.list().data}
    assert "spare1" not in {one["name"] for one in site.adapters()}


def test_a_name_can_differ_from_its_folder_and_be_replaced(site, spare):
    site.post("/reft/load", name="spare", path="spare1")
    assert _text(site, "spare") == site.text(PROMPT, "spare1", COUNT)
    site.post("/reft/load", name="spare", path="spare2")
    assert _text(site, "spare") == site.text(PROMPT, "spare2", COUNT)
    site.post("/reft/load", name="spare", path="spare2")
    assert _text(site, "spare") == site.text(PROMPT, "spare2", COUNT)


def test_more_adapters_than_slots(site):
    for _ in range(2):
        for name in "abcd":
            assert _text(site, name) == site.text(PROMPT, name, COUNT)
    listed = {one["name"]: one["resident"] for one in site.adapters()}
    assert sum(listed.values()) <= site.slots < len(listed)
    assert site.metrics()["reft:bank_evictions_total"] > 0


@pytest.mark.parametrize("change", ["unload", "replace"])
def test_a_request_in_flight_keeps_its_adapter(site, spare, change):
    count = 200
    site.post("/reft/load", name="spare", path="spare1")
    stream = site.client.completions.create(
        model="spare", prompt=PROMPT, max_tokens=count, temperature=0, stream=True
    )
    events = iter(stream)
    parts = [next(events).choices[0].text]
    if change == "unload":
        assert site.post("/reft/unload", name="spare")["requests"] == 1
        with _not_found():
            _text(site, "spare")
    else:
        site.post("/reft/load", name="spare", path="spare2")
        assert _text(site, "spare") == site.text(PROMPT, "spare2", COUNT)
    parts += [event.choices[0].text for event in events]
    assert "".join(parts) == site.text(PROMPT, "spare1", count)


def test_a_folder_that_changes_is_another_adapter(site, spare):
    folder = site.root / "spare-changing"
    shutil.copytree(site.root / "spare1", folder)
    try:
        site.post("/reft/load", name="spare", path=folder.name)
        assert _text(site, "spare") == site.text(PROMPT, "spare1", COUNT)
        shutil.rmtree(folder)
        assert _text(site, "spare") == site.text(PROMPT, "spare1", COUNT)
        shutil.copytree(site.root / "spare2", folder)
        site.post("/reft/load", name="spare", path=folder.name)
        assert _text(site, "spare") == site.text(PROMPT, "spare2", COUNT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_loads_at_the_same_time(site, spare):
    with ThreadPoolExecutor(4) as pool:
        names = [f"spare{number}" for number in range(8)]
        loads = [pool.submit(site.post, "/reft/load", name=name, path="spare1") for name in names]
        assert [load.result()["name"] for load in loads] == names
        answers = list(pool.map(lambda name: _text(site, name), names))
    assert answers == [site.text(PROMPT, "spare1", COUNT)] * 8
