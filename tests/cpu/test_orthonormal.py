"""Native orthonormal maps against the fp64 reference, within the budget of :mod:`tests.maps`.

``tests/test_parametrization.py`` runs on this backend, too. Here the operators are called directly,
with shapes that are difficult: square ones, where reflectors cancel most, and shapes that exceed
the register blocks and the blocks of the sums.
"""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from reft_kernels import dispatch
from reft_kernels.parametrization import orthonormality_error
from tests import maps

_WHY_NOT = dispatch.unsupported_reason("cpu", "householder", "cpu", torch.float32)
pytestmark = [
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
    pytest.mark.usefixtures("_cpu_backend", "poison"),
]
OPS = torch.ops.reft_kernels

SHAPES = [  # L, d, r
    (3, 7, 1),
    (1, 1, 1),
    (1, 2, 2),
    (1, 8, 8),
    (3, 45, 3),
    (2, 131, 8),
    (1, 77, 16),
    (1, 33, 32),
    (1, 65, 33),
    (2, 531, 16),
    (2, 535, 20),
    (1, 1100, 40),
    (1, 130, 100),
    (1, 257, 256),
]


@pytest.fixture
def _cpu_backend():
    with rk.backend("cpu"):
        yield


def _draws(count, layers, d, r, **how):
    return [
        (maps.draw(layers, d, r, "cpu", **how), torch.randn(2, layers, r, d).unbind())
        for _ in range(count)
    ]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", maps.MAPS)
def test_outputs_and_gradient(name, shape, base):
    maps.check(OPS, name, _draws(8 if shape[2] < 64 else 2, *shape, base=base))


@pytest.mark.parametrize(("r", "seed"), [(16, 405396), (32, 387368), (32, 910595), (32, 884269)])
def test_square_with_a_base_where_one_long_sum_left_the_budget(r, seed):
    torch.manual_seed(seed)
    maps.check(OPS, "householder", _draws(8, 1, r, r, base=True))


@pytest.mark.parametrize("shape", [(1, 16384, 256), (1, 8192, 64), (2, 4096, 8)], ids=str)
@pytest.mark.parametrize("name", maps.MAPS)
def test_orthonormal_rows(name, shape):
    layers, d, r = shape
    R, _, _ = getattr(OPS, name)(
        *maps.draw(layers, d, r, "cpu", base=True, W=False, scale=1 / d**0.5)
    )
    assert orthonormality_error(R) <= 1e-6
