"""CUDA kernels against the fp64 reference, on every launch path and in each dtype.

The budget is that of :mod:`tests.budget`. The kernels run on a GPU or, if
``REFT_KERNELS_CUDA_LIBRARY`` names its library, in the emulation (tests/cuda/test_emulation.py).
The tests of the public functions run with this backend, too.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

import reft_kernels as rk
from reft_kernels import checks, cuda
from reft_kernels.activations import ACTIVATIONS
from reft_kernels.parametrization import orthonormality_error
from tests import budget, inputs, maps, plain
from tests.cuda.support import DEVICE, MARKS, emulation_alone, gpu_alone, in_each_order, kernels
from tests.inputs import Case

pytestmark = MARKS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAPS = maps.MAPS


# edits

EDITS = {
    "vectors": Case((2, 12), 72, 5, rows=9),
    "odd d": Case((2, 12), 37, 3, rows=9, inplace=True),
    "d = 1": Case((2, 12), 1, 1, rows=9),
    "sets": Case((2, 12), 64, 8, rows=9, sets=3, coeff=True),
    "four rows a block": Case((4, 100), 64, 4, rows=301, inplace=True),
    "four rows a block, sets": Case((4, 100), 40, 20, rows=301, sets=3, coeff=True),
    "four rows a block, odd d": Case((4, 100), 37, 2, rows=301, sets=2),
    "many rows": Case((4, 300), 40, 3, rows=1100, sets=2, inplace=True),
    "many rows, two passes": Case((4, 300), 48, 9, rows=1100),
    "two columns a thread": Case((2, 30), 8192, 4, rows=50, coeff=True, inplace=True),
}


def _edits() -> list:
    """Every member, case, dtype and activation; most of them are left out of the emulation's default set."""
    found = []
    for name, case, dtype, activation in itertools.product(
        plain.MEMBERS, EDITS, DTYPES, ("linear", "gelu")
    ):
        # one of two for each case, in turn
        kept = (name, activation, dtype) == (
            ("noreft", "gelu", torch.bfloat16),
            ("loreft", "linear", torch.float32),
        )[list(EDITS).index(case) % 2]
        marks = () if kept else pytest.mark.emulation_full
        found.append(
            pytest.param(
                name,
                EDITS[case],
                dtype,
                activation,
                id=f"{name}-{case}-{dtype}-{activation}",
                marks=marks,
            )
        )
    return found


@pytest.mark.parametrize(("name", "case", "dtype", "activation"), _edits())
def test_error_budget(name, case, dtype, activation):
    case = case._replace(activation=activation)
    budget.check(lambda: inputs.draw(name, case, dtype, DEVICE), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_budget_of_each_activation(activation, dtype):
    case = Case((2, 12), 48, 6, rows=9, coeff=True, activation=activation)
    budget.check(lambda: inputs.draw("noreft", case, dtype, DEVICE), dtype)


@pytest.mark.parametrize("rows", [20, 300])
@pytest.mark.parametrize("r", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 128, 255, 256])
@pytest.mark.parametrize("name", ["loreft", "noreft"])
def test_ranks(name, r, rows):
    case = Case((2, 160), 264, r, rows=rows, activation="linear" if name == "loreft" else "silu")
    budget.check(lambda: inputs.draw(name, case, torch.bfloat16, DEVICE), torch.bfloat16, draws=2)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_weights(dtype, weights):
    """Weights in fp32, in the hidden state's dtype, and in mixed dtypes."""

    def make(changed):
        drawn = inputs.draw("loreft", Case((2, 12), 48, 6, rows=9, coeff=True), dtype, DEVICE)
        given = {k: t.to(weights) if k in changed else t for k, t in drawn.inputs.items()}
        return drawn._replace(inputs=given)

    for changed in (("R", "W", "b", "coeff"), ("W", "b")):
        budget.check(lambda changed=changed: make(changed), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["aligned", "unaligned", "offset", "channels"])
def test_strides(layout, dtype):
    """A hidden state that is a slice of a wider one is edited in place."""
    d, total = 48, 20
    wide = torch.randn(total, 2 * d + 8, device=DEVICE).to(dtype)
    part = {
        "aligned": lambda t: t[:, 8 : d + 8],
        "unaligned": lambda t: t.flatten()[: total * (d + 3)].view(total, d + 3)[:, :d],
        "offset": lambda t: t[:, 1 : d + 1],
        "channels": lambda t: t[:, : 2 * d : 2],
    }[layout]
    weights = inputs.weights("loreft", Case(d=d, r=5), device=DEVICE)
    rows = inputs.rows(total, 9, device=DEVICE)
    want = rk.loreft(part(wide).contiguous(), *weights.values(), rows=rows)
    edited = wide.clone()
    results = rk.loreft(part(edited), *weights.values(), rows=rows, inplace=True)
    torch.testing.assert_close(
        results, want, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps
    )
    untouched = torch.ones_like(wide, dtype=torch.bool)
    part(untouched).fill_(False)
    assert torch.equal(edited[untouched], wide[untouched])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unselected_rows_are_bit_identical(dtype, inplace):
    """Unselected rows may hold NaN, which does not reach other rows or any gradient."""
    rows = inputs.rows(64, 20, device=DEVICE)
    outside = torch.ones(64, dtype=torch.bool, device=DEVICE)
    outside[rows[rows >= 0].long()] = False
    hidden, grad = (torch.randn(64, 40, device=DEVICE).to(dtype) for _ in range(2))
    hidden[outside] = grad[outside] = float("nan")
    weights = {
        k: t.requires_grad_()
        for k, t in inputs.weights("loreft", Case(d=40), device=DEVICE).items()
    }
    leaf = hidden.clone().requires_grad_()
    out = rk.loreft(leaf.clone(), **weights, rows=rows, inplace=inplace)
    out.backward(grad)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.detach()[outside].view(bits), hidden[outside].view(bits))
    assert torch.equal(leaf.grad[outside].view(bits), grad[outside].view(bits))
    assert out.detach()[~outside].isfinite().all() and leaf.grad[~outside].isfinite().all()
    assert all(w.grad.isfinite().all() for w in weights.values())


@pytest.mark.parametrize("rows", [30, 301])
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_two_runs_are_bit_identical(name, rows):
    case = Case((4, 100), 136, 12, rows=rows, sets=3, coeff=True, activation="gelu")
    drawn = inputs.draw(name, case, torch.bfloat16, DEVICE)
    grad = torch.randn(4, 100, 136, device=DEVICE)
    first, second = (budget.outputs(drawn.engine, drawn.inputs, grad) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@emulation_alone
@pytest.mark.parametrize("rows", [30, 301])
def test_the_order_of_threads_changes_no_bit_of_an_edit(rows):
    case = Case((4, 100), 136, 12, rows=rows, sets=3, coeff=True, activation="gelu")
    drawn = inputs.draw("noreft", case, torch.bfloat16, DEVICE)
    grad = torch.randn(4, 100, 136, device=DEVICE)
    first, *others = in_each_order(lambda: budget.outputs(drawn.engine, drawn.inputs, grad))
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)


def test_in_place_and_out_of_place_agree_bit_for_bit():
    case = Case((4, 100), 136, 12, rows=301, activation="gelu")
    torch.manual_seed(1)
    drawn = inputs.draw("noreft", case, torch.bfloat16, DEVICE)
    torch.manual_seed(1)
    in_place = inputs.draw("noreft", case._replace(inplace=True), torch.bfloat16, DEVICE)
    grad = torch.randn(4, 100, 136, device=DEVICE)
    first, second = (budget.outputs(d.engine, d.inputs, grad) for d in (drawn, in_place))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("entries", [[], [-1], [-1] * 300])
def test_nothing_selected(entries):
    rows = torch.tensor(entries, dtype=torch.int32, device=DEVICE)
    weights = {
        k: t.requires_grad_()
        for k, t in inputs.weights("noreft", Case(d=40), device=DEVICE).items()
    }
    coeff = torch.full((len(entries), 3), float("nan"), device=DEVICE, requires_grad=True)
    leaf = torch.randn(8, 40, device=DEVICE, requires_grad=True)
    out = rk.noreft(
        leaf.clone(), **weights, rows=rows, coeff=coeff, activation="silu", inplace=True
    )
    grad = torch.randn(8, 40, device=DEVICE)
    out.backward(grad)
    assert torch.equal(out, leaf) and torch.equal(leaf.grad, grad)
    assert all((t.grad == 0).all() for t in (*weights.values(), coeff))


def test_skipped_entries_add_nothing():
    """A skipped entry may have a NaN coeff and a weight id that is out of range."""
    rows = inputs.rows(400, 301, device=DEVICE)
    rows[::3] = -1
    weight_ids = torch.randint(3, (301,), dtype=torch.int32, device=DEVICE)
    weight_ids[::3] = 12345
    checks.mark_rows(weight_ids, 3)  # the public function would raise
    coeff = torch.rand(301, 6, device=DEVICE)
    coeff[rows < 0] = float("nan")
    coeff.requires_grad_()
    case = Case(d=40, r=6, sets=3)
    weights = {
        k: t.requires_grad_() for k, t in inputs.weights("noreft", case, device=DEVICE).items()
    }
    hidden = torch.randn(400, 40, device=DEVICE, requires_grad=True)
    rk.noreft(
        hidden, **weights, rows=rows, weight_ids=weight_ids, coeff=coeff, activation="tanh"
    ).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (*weights.values(), hidden, coeff))
    assert (coeff.grad[rows < 0] == 0).all() and (coeff.grad[rows >= 0] != 0).any()


def test_a_rank_over_the_limit_is_refused():
    hidden, weight = torch.zeros(4, 512, device=DEVICE), torch.zeros(257, 512, device=DEVICE)
    rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="write: got rank 257"):
        cuda.edit(
            hidden, hidden, rows, None, weight, None, weight, None, None, False, "linear", False
        )


@pytest.mark.parametrize("activation", ["linear", "gelu"])
def test_launches_of_an_edit(activation):
    drawn = inputs.draw(
        "noreft", Case((4, 100), 64, 8, rows=50, activation=activation), torch.bfloat16, DEVICE
    )
    leaves = {k: t.requires_grad_() for k, t in drawn.inputs.items()}
    assert kernels(lambda: drawn.engine(**leaves)) == 1
    grad = torch.randn(4, 100, 64, device=DEVICE)
    assert kernels(lambda: drawn.engine(**leaves).backward(grad)) == 3


@gpu_alone
def test_captured_in_a_graph():
    """An edit and its backward do not synchronize, so a CUDA graph can capture them."""
    hidden, grad = torch.randn(64, 40, device=DEVICE), torch.randn(64, 40, device=DEVICE)
    weights = {
        k: t.requires_grad_()
        for k, t in inputs.weights("loreft", Case(d=40), device=DEVICE).items()
    }
    rows = inputs.rows(64, 20, device=DEVICE)

    def step():
        leaf = hidden.clone().requires_grad_()
        out = rk.loreft(leaf, **weights, rows=rows)
        return out, *torch.autograd.grad(out, (leaf, *weights.values()), grad)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    hidden.normal_()
    grad.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@gpu_alone
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_is_the_tensors():
    other = torch.device("cuda", 1)
    drawn = inputs.draw("loreft", Case((2, 12), 48, 6, rows=9), torch.float32, other)
    assert drawn.engine(**drawn.inputs).device == other
    assert torch.cuda.current_device() == 0
    budget.check(
        lambda: inputs.draw("loreft", Case((2, 12), 48, 6, rows=9), torch.float32, other),
        torch.float32,
    )


# orthonormal maps

SHAPES = [  # layers, d, r
    (3, 7, 1),
    (1, 1, 1),
    (1, 12, 12),
    (3, 45, 3),
    (2, 131, 8),
    (1, 77, 16),
    (32, 256, 8),
    (1, 4096, 8),
    (5, 1100, 5),
    (200, 40, 3),
    (1, 65, 33),
    (1, 600, 40),
    (2, 130, 100),
    (1, 2048, 32),
    (1, 257, 256),
]


_build_inputs = functools.partial(maps.draw, device=DEVICE)
_check = functools.partial(maps.check, cuda)
_both, _double = maps.both, maps.double


def _grads(layers, d, r):
    return torch.randn(2, layers, r, d, device=DEVICE).unbind()


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_outputs_and_gradient(name, shape, base):
    _check(name, [(_build_inputs(*shape, base=base), _grads(*shape)) for _ in range(2)])


@pytest.mark.parametrize("r", [2, 4, 7, 9, 15, 17, 24, 31, 63, 64, 65, 128, 255])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_ranks_of_the_maps(name, r):
    _check(name, [(_build_inputs(2, 300, r, base=True), _grads(2, 300, r)) for _ in range(2)])


@pytest.mark.parametrize("shape", [(24, 3), (2, 40, 8), (1, 1024, 8)], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_equals_the_definition(name, shape):
    """Forward and gradient equal the definition within the budget.

    householder is torch.linalg.householder_product, cayley the d x d Cayley transform.
    """

    def make():
        X = (torch.randn(*shape) / shape[-2] ** 0.5).to(DEVICE)
        return budget.Draw({"X": X}, getattr(rk, name), plain.MAPS[name])

    budget.check(make, torch.float32)


@pytest.mark.parametrize(("signs", "W"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_without_signs_or_W(name, signs, W):
    grad_R, grad_D = _grads(2, 19, 3)
    _check(name, [(_build_inputs(2, 19, 3, signs=signs, W=W), (grad_R, grad_D if W else None))])


@pytest.mark.parametrize(
    "present", [(True, False), (False, True), (False, False)], ids=["R", "D", "none"]
)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_gradients_that_are_none(name, present):
    grads = [t if given else None for t, given in zip(_grads(2, 21, 4), present, strict=True)]
    for base in (False, True):
        _check(name, [(_build_inputs(2, 21, 4, base=base), grads)])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_half_precision_X(name, dtype):
    _check(name, [(_build_inputs(3, 37, 5, dtype=dtype), _grads(3, 37, 5)) for _ in range(2)])


@pytest.mark.parametrize("shape", [(2, 40, 4), (1, 4096, 8), (1, 700, 48)], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_strided_inputs_and_two_runs_are_bit_identical_for_the_maps(name, shape):
    given, grads = _build_inputs(*shape, base=True), _grads(*shape)
    first = _both(cuda, name, given, grads)
    strided = [t.mT.contiguous().mT if t.dim() > 2 else t for t in given]
    for again in (
        _both(cuda, name, given, grads),
        _both(cuda, name, strided, [t.mT.contiguous().mT for t in grads]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@emulation_alone
@pytest.mark.parametrize("shape", [(2, 40, 4), (1, 4096, 8), (1, 700, 48)], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_the_order_of_threads_changes_no_bit_of_the_maps(name, shape):
    given, grads = _build_inputs(*shape, base=True), _grads(*shape)
    first, *others = in_each_order(lambda: _both(cuda, name, given, grads))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(2, 33, 4), (1, 2048, 8), (1, 600, 40)], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_zero_X_is_exactly_the_base_point(name, shape):
    X, signs, base, point, W = _build_inputs(*shape, base=True)
    R, D, _ = getattr(cuda, name)(torch.zeros_like(X), signs, base, point, W)
    assert torch.equal(R, point)
    assert torch.equal(D, W - R)


@pytest.mark.parametrize("r", [1, 8, 32, 64])
@pytest.mark.parametrize("scale", [0.3, math.sqrt(8192)])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_orthonormal_rows_at_d_8192(name, scale, r):
    R, _, _ = getattr(cuda, name)(
        *_build_inputs(1, 8192, r, scale=scale / math.sqrt(8192), W=False)
    )
    assert orthonormality_error(R) <= 1e-6


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_entries_that_are_not_read(name):
    """Entries on and above the diagonal of the top block may be NaN."""
    given, grads = _build_inputs(2, 21, 4), _grads(2, 21, 4)
    spoiled = given[0].clone()
    spoiled[torch.ones_like(spoiled).triu().bool()] = float("nan")
    for a, b in zip(
        _both(cuda, name, given, grads),
        _both(cuda, name, (spoiled, *given[1:]), grads),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_no_layers(name):
    X = torch.zeros(0, 8, 2, device=DEVICE)
    R, D, aux = getattr(cuda, name)(X, None, None, None, None)
    assert (R.shape, D.shape, aux.shape) == ((0, 2, 8), (0,), (0, 1, 2, 2))
    assert getattr(cuda, f"{name}_backward")(R, None, X, None, None, aux).shape == X.shape


@pytest.mark.parametrize("shape", [(32, 256, 8), (1, 4096, 8), (1, 600, 40)], ids=str)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.maps
def test_one_launch_for_all_layers(name, shape):
    given, grads = _build_inputs(*shape), _grads(*shape)
    aux = getattr(cuda, name)(*given)[2]
    assert kernels(lambda: getattr(cuda, name)(*given)) == 1
    assert kernels(lambda: getattr(cuda, f"{name}_backward")(*grads, *given[:3], aux)) == 1
