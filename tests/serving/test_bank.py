"""Slots: filling, padding, eviction of the least recently used, return of evicted adapters."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.serving.adapters import Form
from reft_kernels.serving.bank import Bank
from reft_kernels.serving.errors import AdapterError
from tests.serving.served import adapter


def _bank(slots: int = 2, layers=(0, 1, 2), rank: int = 4) -> Bank:
    return Bank(layers, 6, slots, rank, "cpu")


def _hosts(*names: str, **options) -> dict:
    return {name: adapter(name, **options) for name in names}


def test_a_smaller_rank_is_padded_and_other_layers_are_zero():
    bank, hosts = _bank(), _hosts("a", rank=3, layers=(0, 2))
    slot = bank.place([("a", 0)], hosts)["a", 0]
    a = hosts["a"]
    for index, source in ((0, 0), (2, 1)):
        assert torch.equal(bank.read[index, slot, :3], a.read[0, source])
        assert torch.equal(bank.read_bias[index, slot, :3], a.read_bias[0, source])
        assert torch.equal(bank.write[index, slot, :3], a.write[0, source])
    for tensor in (bank.read, bank.read_bias, bank.write):
        assert not tensor[:, slot, 3:].any() and not tensor[1, slot].any()


def test_a_bank_of_some_layers_takes_those_of_the_adapter():
    """A rank of pipeline parallelism holds the layers 2 and 3."""
    bank, hosts = _bank(layers=(2, 3)), _hosts("a", layers=(0, 3))
    slot = bank.place([("a", 0)], hosts)["a", 0]
    assert torch.equal(bank.write[1, slot, :2], hosts["a"].write[0, 1])
    assert not bank.write[0].any()


def test_the_least_recently_used_adapter_makes_room_and_comes_back():
    bank, hosts = _bank(), _hosts("a", "b", "c")
    bank.place([("a", 0)], hosts)
    bank.place([("b", 0)], hosts)
    bank.place([("a", 0)], hosts)
    assert bank.place([("c", 0)], hosts)  # in place of b
    assert bank.resident == {"a", "c"}
    slot = bank.place([("b", 0)], hosts)["b", 0]
    assert bank.resident == {"b", "c"}
    assert torch.equal(bank.write[0, slot, :2], hosts["b"].write[0, 0])


def test_no_adapter_of_the_step_is_evicted():
    bank, hosts = _bank(slots=3), _hosts("a", "b", "c", "d")
    bank.place([("a", 0), ("b", 0), ("c", 0)], hosts)
    slots = bank.place([("d", 0), ("a", 0), ("b", 0)], hosts)  # a and b are the oldest
    assert bank.resident == {"a", "b", "d"} and len(set(slots.values())) == 3
    for name in "abd":
        assert torch.equal(bank.write[0, slots[name, 0], :2], hosts[name].write[0, 0])


def test_a_smaller_adapter_leaves_nothing_of_the_one_before():
    bank = _bank(slots=1)
    hosts = {"a": adapter("a", rank=4, layers=(0, 1, 2)), "b": adapter("b", rank=1, layers=(1,))}
    bank.place([("a", 0)], hosts)
    bank.place([("b", 0)], hosts)
    assert not bank.write[[0, 2]].any() and not bank.write[1, 0, 1:].any()


def test_more_sets_than_slots_are_refused():
    bank, hosts = _bank(), _hosts("a", "b", untied=True)
    with pytest.raises(AdapterError, match="got 3 weight sets in one step, expected at most 2"):
        bank.place([("a", 0), ("a", 1), ("b", 0)], hosts)
    slots = bank.place([("a", 0), ("a", 1)], hosts)
    for number in (0, 1):
        assert torch.equal(bank.write[0, slots["a", number], :2], hosts["a"].write[number, 0])


def test_a_forgotten_adapter_frees_its_slots():
    bank, hosts = _bank(), _hosts("a", "b", "c")
    bank.place([("a", 0), ("b", 0)], hosts)
    bank.forget("a")
    bank.forget("unknown")
    assert bank.resident == {"b"}
    bank.place([("c", 0)], hosts)
    assert bank.resident == {"b", "c"}


def test_the_storage_is_allocated_once():
    bank, hosts = _bank(slots=1), _hosts("a", "b")
    before = [t.data_ptr() for t in bank.weights(0, Form())[:3]]
    bank.place([("a", 0)], hosts)
    bank.place([("b", 0)], hosts)
    assert [t.data_ptr() for t in bank.weights(0, Form())[:3]] == before
