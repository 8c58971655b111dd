"""Triton kernels that build R and D, and their backward, against the fp64 reference.

The reference is ``reft_kernels/orthonormal.py``. The budget is that of :mod:`tests.budget` with the
torch functions in fp32 as the straightforward computation. Every input of the backend functions is
varied, and new memory is filled with NaN.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math

import pytest
import torch

from reft_kernels import orthonormal
from reft_kernels.dispatch import interpreting
from reft_kernels.parametrization import orthonormality_error
from tests import maps

pytest.importorskip("triton", reason="needs the package triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip(
        "needs a GPU, or the Triton interpreter (TRITON_INTERPRET=1)", allow_module_level=True
    )

kernels = importlib.import_module("reft_kernels.triton.orthonormal")
launch = importlib.import_module("reft_kernels.triton.orthonormal_launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16, which doubles the error, so bf16 needs a GPU
DTYPES = (
    (torch.float32, torch.float16)
    if interpreting()
    else (torch.float32, torch.float16, torch.bfloat16)
)
MAPS = maps.MAPS
SHAPES = (
    (3, 7, 1),
    (3, 45, 3),
    (3, 64, 4),
    (2, 131, 8),
    (1, 77, 16),
    (1, 65, 33),
)  # L, d, r; r = 33 needs four tiles
CASES = [(shape, base) for shape in SHAPES for base in (False, True) if base or shape[2] <= 16]


_inputs = functools.partial(maps.draw, device=DEVICE)
_check = functools.partial(maps.check, kernels)
_both, _double = maps.both, maps.double


@pytest.mark.parametrize(("shape", "base"), CASES, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_outputs_and_gradient(name, base, shape, poison):
    layers, d, r = shape
    draws = [_inputs(*shape, base=base) for _ in range(1 if r > 4 else 2)]
    _check(
        name, [(inputs, torch.randn(2, layers, r, d, device=DEVICE).unbind()) for inputs in draws]
    )


@pytest.mark.parametrize("shape", [(1, 12, 12), (1, 1, 1), (2, 300, 5)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_square_and_tiny_and_several_splits(name, shape, poison):
    layers, d, r = shape
    inputs = _inputs(*shape, base=True)
    _check(name, [(inputs, torch.randn(2, layers, r, d, device=DEVICE).unbind())])


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 130, 100), (1, 257, 256)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_large_ranks(name, shape, poison):
    layers, d, r = shape
    inputs = _inputs(*shape, base=True)
    _check(name, [(inputs, torch.randn(2, layers, r, d, device=DEVICE).unbind())])


@pytest.mark.parametrize(("signs", "W"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("name", MAPS)
def test_without_signs_or_W(name, signs, W, poison):
    inputs = _inputs(2, 19, 3, signs=signs, W=W)
    grad_R, grad_D = torch.randn(2, 2, 3, 19, device=DEVICE).unbind()
    _check(name, [(inputs, (grad_R, grad_D if W else None))])


@pytest.mark.parametrize(
    "present", [(True, False), (False, True), (False, False)], ids=["R", "D", "none"]
)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_that_are_none(name, present, poison):
    grads = [torch.randn(2, 4, 21, device=DEVICE) if given else None for given in present]
    for base in (False, True):
        _check(name, [(_inputs(2, 21, 4, base=base), grads)])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_half_precision_X(name, dtype, poison):
    draws = [
        (_inputs(3, 37, 5, dtype=dtype), torch.randn(2, 3, 5, 37, device=DEVICE).unbind())
        for _ in range(2)
    ]
    _check(name, draws)


@pytest.mark.parametrize("name", MAPS)
def test_strided_inputs_and_two_runs_are_bit_identical(name, poison):
    inputs = _inputs(2, 40, 4, base=True)
    grads = torch.randn(2, 2, 4, 40, device=DEVICE).unbind()
    first = _both(kernels, name, inputs, grads)
    strided = [
        t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 2 else t for t in inputs
    ]
    assert not strided[0].is_contiguous()
    expanded = [t.mT.contiguous().mT for t in grads]
    for again in (_both(kernels, name, inputs, grads), _both(kernels, name, strided, expanded)):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("name", MAPS)
def test_the_number_of_splits_changes_no_bit(name, processors, monkeypatch):
    inputs = _inputs(1, 300, 3, base=True)
    grads = torch.randn(2, 1, 3, 300, device=DEVICE).unbind()
    want = _both(kernels, name, inputs, grads)
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    for a, b in zip(want, _both(kernels, name, inputs, grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAPS)
def test_a_layer_of_a_stack_has_the_bits_of_the_layer_alone(name):
    inputs = _inputs(3, 290, 5, base=True)
    grads = torch.randn(2, 3, 5, 290, device=DEVICE).unbind()
    stacked = _both(kernels, name, inputs, grads)
    alone = _both(kernels, name, [t[1:2] for t in inputs], [t[1:2] for t in grads])
    for a, b in zip(stacked, alone, strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 30.0, 1e4])
@pytest.mark.parametrize("name", MAPS)
def test_small_and_large_X(name, scale, poison):
    """The rows of R stay orthonormal for every size of X, and R and D within the budget."""
    inputs = _inputs(2, 300, 6, base=True, scale=scale)
    R, D, _ = getattr(kernels, name)(*inputs)
    assert orthonormality_error(R) <= 1e-6
    exact = getattr(orthonormal, name)(*_double(inputs))
    plain = getattr(orthonormal, name)(*inputs)
    for got, theirs, ref in zip((R, D), plain, exact, strict=False):
        error = (got.double() - ref).abs().max()
        straightforward = (theirs.double() - ref).abs().max()
        assert error <= 2 * straightforward + torch.finfo(torch.float32).eps * ref.abs().max()


@pytest.mark.parametrize("r", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", MAPS)
def test_several_partial_sums(name, r, poison):
    """d of three partial sums, of which the last is short."""
    inputs = _inputs(1, 521, r, base=True)
    _check(name, [(inputs, torch.randn(2, 1, r, 521, device=DEVICE).unbind())])


@pytest.mark.parametrize("name", MAPS)
def test_zero_X_is_exactly_the_base_point(name):
    X, signs, base, point, W = _inputs(2, 33, 4, base=True)
    R, D, _ = getattr(kernels, name)(torch.zeros_like(X), signs, base, point, W)
    assert torch.equal(R, point)
    assert torch.equal(D, W - R)


@pytest.mark.parametrize("scale", [0.3, math.sqrt(8192)])
@pytest.mark.parametrize("name", MAPS)
def test_orthonormal_rows_at_d_8192(name, scale):
    R, _, _ = getattr(kernels, name)(*_inputs(1, 8192, 8, scale=scale / math.sqrt(8192), W=False))
    assert orthonormality_error(R) <= 1e-6


@pytest.mark.parametrize("name", MAPS)
def test_no_layers(name):
    X = torch.zeros(0, 8, 2, device=DEVICE)
    R, D, aux = getattr(kernels, name)(X, None, None, None, None)
    assert (R.shape, D.shape, aux.shape) == ((0, 2, 8), (0,), (0, 1, 2, 2))
    assert getattr(kernels, f"{name}_backward")(R, None, X, None, None, aux).shape == X.shape


def test_launch_configuration():
    for layers, d, r in itertools.product(
        (1, 32, 80), (1, 37, 4096, 8192), (1, 3, 8, 33, 64, 100, 256)
    ):
        config = launch.build_config(layers, d, r, 132)
        assert config.tile & (config.tile - 1) == 0 and config.tile <= 32
        assert config.padded >= r and config.padded % config.tile == 0
        assert config.rows % config.block_d == 0
        # the sums that the first launch writes are small beside X
        assert 2 * config.padded**2 * (d // config.rows) <= d * config.padded / 4
        # every program has rows
        assert (config.splits - 1) * config.chunk < d <= config.splits * config.chunk
        assert config.chunk % config.block_c == 0
        assert config.splits == 1 or layers * config.splits <= 132 * 4
        assert config.splits == 1 or layers * config.splits * config.padded**2 * 88 <= 64 << 20
    assert launch.build_config(32, 4096, 8, 132).splits == 16
    assert launch.build_config(1, 4096, 8, 132).splits == 128


@pytest.mark.parametrize("r", [1, 3, 8, 16, 64])
def test_the_number_of_layers_compiles_nothing_new(r):
    """Triton specializes integer arguments that are 1 or multiples of 16."""

    def specialization(layers):
        config = launch.build_config(layers, 4096, r, 132)
        assert config.chunk > 1
        return (
            config.gram_constexprs(),
            config.constexprs(),
            (config.gram_warps, config.num_warps, config.gram_stages, config.num_stages),
            config.chunk % 16 == 0,
        )

    assert all(specialization(layers) == specialization(1) for layers in range(2, 130))
