"""Former public names: they work for one release, warn, and give the same values."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import reft_kernels as rk
from reft_kernels import related_methods

D, R, N = 8, 3, 4
IDS = torch.tensor([0, 1, 1, 0], dtype=torch.int32)


def _arguments(name):
    W, S = torch.randn(2, R, D), torch.randn(2, R)
    return {
        "loreft": (W, W + 1, S),
        "direft": (W, W + 1, S),
        "nodireft": (W, W + 1, S),
        "noreft": (W, W + 1, S),
        "consreft": (W, S),
        "lobireft": (W, S),
        "red": (torch.randn(2, D), torch.randn(2, D)),
    }[name]


@pytest.mark.parametrize(
    "name", ["loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "red"]
)
def test_set_ids_is_weight_ids(name):
    function, hidden, weights = getattr(rk, name), torch.randn(N, D), _arguments(name)
    expected = function(hidden, *weights, weight_ids=IDS)
    with pytest.warns(DeprecationWarning, match="set_ids is now called weight_ids") as seen:
        got = function(hidden, *weights, set_ids=IDS)
    assert torch.equal(got, expected) and seen[0].filename == __file__
    with pytest.raises(TypeError, match="set_ids: got both"):
        function(hidden, *weights, set_ids=IDS, weight_ids=IDS)


def test_a_module_takes_both():
    module = rk.LoReFT(D, R, num_sets=2)
    hidden = torch.randn(N, D)
    with pytest.warns(DeprecationWarning, match="weight_ids"):
        got = module(hidden, set_ids=IDS)
    assert torch.equal(got, module(hidden, weight_ids=IDS))


def test_positions_set_ids():
    with pytest.warns(DeprecationWarning, match="positions.weight_ids"):
        got = rk.positions.set_ids("f1+l1", 2)
    assert torch.equal(got, rk.positions.weight_ids("f1+l1", 2))


def test_neighbours_is_related_methods():
    sys.modules.pop("reft_kernels.neighbours", None)
    with pytest.warns(DeprecationWarning, match="reft_kernels.related_methods"):
        old = importlib.import_module("reft_kernels.neighbours")
    assert all(getattr(old, name) is getattr(related_methods, name) for name in old.__all__)
    assert set(old.__all__) == set(related_methods.__all__)
