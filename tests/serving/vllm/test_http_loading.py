"""Adapters are loaded, replaced and unloaded over HTTP while the server runs."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

PROMPT, COUNT = "Name a fruit.", 12


def _answer(site, name):
    (tokens,) = site.complete(PROMPT, name, COUNT)
    return tokens


def _want(site, folder, count=COUNT):
    return site.tokens(PROMPT, folder, count)


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
        _answer(site, "spare1")
    loaded = site.post("/reft/load", name="spare1")
    assert loaded["name"] == "spare1" and loaded["rank"] == 4 and loaded["positions"] == "f2"
    assert _answer(site, "spare1") == _want(site, "spare1")
    (listed,) = [one for one in site.adapters() if one["name"] == "spare1"]
    assert listed["hash"] == loaded["hash"] and listed["layers"] == [0, 1, 2, 3]
    assert listed["resident"] and listed["named"] and listed["requests"] == 0
    assert "spare1" in {card.id for card in site.client.models.list().data}
    assert site.post("/reft/unload", name="spare1") == {"name": "spare1", "requests": 0}
    with _not_found():
        _answer(site, "spare1")
    assert "spare1" not in {card.id for card in site.client.models.list().data}
    assert "spare1" not in {one["name"] for one in site.adapters()}


def test_a_name_can_differ_from_its_folder_and_be_replaced(site, spare):
    site.post("/reft/load", name="spare", path="spare1")
    assert _answer(site, "spare") == _want(site, "spare1")
    site.post("/reft/load", name="spare", path="spare2")
    assert _answer(site, "spare") == _want(site, "spare2")
    site.post("/reft/load", name="spare", path="spare2")
    assert _answer(site, "spare") == _want(site, "spare2")


def test_more_adapters_than_slots(site):
    for _ in range(2):
        for name in "abcd":
            assert _answer(site, name) == _want(site, name)
    listed = {one["name"]: one["resident"] for one in site.adapters()}
    assert sum(listed.values()) <= site.slots < len(listed)
    assert site.metrics()["reft:bank_evictions_total"] > 0


@pytest.mark.parametrize("change", ["unload", "replace"])
def test_a_request_in_flight_keeps_its_adapter(site, spare, change):
    count = 200
    site.post("/reft/load", name="spare", path="spare1")
    events = iter(site.stream(PROMPT, "spare", count, ignore_eos=True))
    tokens = list(next(events).choices[0].token_ids)
    if change == "unload":
        assert site.post("/reft/unload", name="spare")["requests"] == 1
        with _not_found():
            _answer(site, "spare")
    else:
        site.post("/reft/load", name="spare", path="spare2")
        assert _answer(site, "spare") == _want(site, "spare2")
    for event in events:
        tokens += getattr(event.choices[0], "token_ids", None) or []
    want = _want(site, "spare1", count)  # ends at the end-of-text token, if there is one
    assert tuple(tokens[: len(want)]) == want and len(tokens) == count


def test_a_folder_that_changes_is_another_adapter(site, spare):
    folder = site.root / "spare-changing"
    shutil.copytree(site.root / "spare1", folder)
    try:
        site.post("/reft/load", name="spare", path=folder.name)
        assert _answer(site, "spare") == _want(site, "spare1")
        shutil.rmtree(folder)
        assert _answer(site, "spare") == _want(site, "spare1")
        shutil.copytree(site.root / "spare2", folder)
        site.post("/reft/load", name="spare", path=folder.name)
        assert _answer(site, "spare") == _want(site, "spare2")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_loads_at_the_same_time(site, spare):
    with ThreadPoolExecutor(4) as pool:
        names = [f"spare{number}" for number in range(8)]
        loads = [pool.submit(site.post, "/reft/load", name=name, path="spare1") for name in names]
        assert [load.result()["name"] for load in loads] == names
        answers = list(pool.map(lambda name: _answer(site, name), names))
    assert answers == [_want(site, "spare1")] * 8
