"""Names of adapters, requests in flight, and what a request's edit is."""

from __future__ import annotations

import pytest

from reft_kernels.serving.errors import AdapterError, UnknownAdapter
from reft_kernels.serving.registry import Registry
from reft_kernels.serving.requests import AdapterRequest
from tests.serving.served import adapter, renamed


def _registry(**adapters) -> Registry:
    registry = Registry()
    for name, served in adapters.items():
        registry.add(name, served)
    return registry


def test_an_unknown_name_says_what_is_loaded():
    with pytest.raises(UnknownAdapter, match="got 'x', expected one of those loaded: 'a', 'b'"):
        _registry(a=adapter("a"), b=adapter("b")).get("x")


def test_a_name_can_be_loaded_again_with_the_same_content_only():
    registry = _registry(a=adapter("a"))
    registry.add("a", adapter("a"))
    with pytest.raises(AdapterError, match="whose content differs"):
        registry.add("a", adapter("b"))
    for name in ("", "{json", 3):
        with pytest.raises(AdapterError, match="name: got"):
            registry.add(name, adapter("a"))


def test_weights_are_needed_until_the_last_request_finishes():
    registry = _registry(a=adapter("a"), alias=adapter("a"))
    registry.acquire("a")
    registry.acquire("a")
    registry.remove("a")
    assert registry.is_used("a")
    registry.remove("alias")
    assert registry.is_used("a") and not registry.release("a")
    registry.add("a", adapter("a"))  # loaded again meanwhile
    assert not registry.release("a") and registry.is_used("a")
    registry.remove("a")
    assert not registry.is_used("a")


def test_the_last_release_of_an_unloaded_adapter_says_so():
    registry = _registry(a=adapter("a"))
    registry.acquire("a")
    registry.remove("a")
    assert registry.release("a")


def test_the_edit_of_a_request():
    served = adapter("a", rank=3)
    registry = _registry(a=served, t=renamed(adapter("t", template=((7, 8),)), "t"))
    edit = registry.resolve(AdapterRequest("a", 0.5, (1,)), 9, None)
    assert edit.content == "a" and [tuple(r) for r in edit.ranges] == [(0, 2, 0), (7, 9, 0)]
    assert edit.coefficient == 0.5 and edit.subspaces == (1,)
    short = registry.resolve(AdapterRequest("a", prompt_length=5), 9, None)
    assert [tuple(r) for r in short.ranges] == [(0, 2, 0), (3, 5, 0)]
    tokens = [1, 7, 8, 2, 7, 8, 5, 5, 5]
    by_template = registry.resolve(AdapterRequest("t"), 9, tokens)
    assert [tuple(r) for r in by_template.ranges] == [(0, 2, 0), (4, 6, 0)]
    without = registry.resolve(AdapterRequest("t"), 4, [1, 2, 3, 4])
    assert without.end == 4


def test_an_edit_of_nothing_is_none():
    registry = _registry(a=adapter("a"))
    assert registry.resolve(AdapterRequest("a", 0.0), 9, None) is None
    assert registry.resolve(AdapterRequest("a"), 1, None) is None


@pytest.mark.parametrize(
    ("name", "request_", "message"),
    [
        ("a", AdapterRequest("a", subspaces=(0, 2)), "expected numbers below 2"),
        ("a", AdapterRequest("a", prompt_length=10), "expected at most 9"),
        ("t", AdapterRequest("t"), "response template"),
    ],
)
def test_a_request_that_does_not_fit(name, request_, message):
    registry = _registry(a=adapter("a"), t=adapter("t", template=((7,),)))
    with pytest.raises(AdapterError, match=message):
        registry.resolve(request_, 9, None)
