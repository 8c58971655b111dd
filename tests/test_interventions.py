"""Tests of the modules: initial values, stacking, cached weights, dropout and state."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reft_kernels as rk
from reft_kernels import checks, interventions
from reft_kernels.activations import ACTIVATIONS

CLASSES = {
    cls.__name__.removeprefix("Stacked").lower(): cls for cls in interventions.STACKED.values()
}
SINGLE = {name: getattr(rk, cls.__name__.removeprefix("Stacked")) for name, cls in CLASSES.items()}
FAMILY = [name for name in SINGLE if name != "red"]
ORTHONORMAL = ["loreft", "direft", "consreft", "lobireft"]
D, R, L = 12, 3, 2

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]


class Calls(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.all.append(function._schema.name)
        return function(*args, **(kwargs or {}))

    @property
    def engine(self) -> list[str]:
        return [
            name.removeprefix("reft_kernels::")
            for name in self.all
            if name.startswith("reft_kernels::")
        ]


def _perturbed(module):
    """Change every parameter from its initial value, so that none is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape).to(p))
    return module


def _arguments(name: str, **more) -> dict:
    return {} if name == "red" else more


# initial values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["loreft", "direft", "nodireft", "noreft", "lobireft", "red"])
def test_identity_leaves_hidden_bit_identical(name, dtype, backend, device):
    module = SINGLE[name](D, R, init="identity", device=device)
    if name == "noreft":
        assert torch.equal(module.W2, torch.zeros_like(module.W2))
    hidden = torch.randn(2, 4, D, device=device).to(dtype)
    rows = torch.tensor([0, 7, -1, 3], dtype=torch.int32, device=device)
    for kwargs in ({}, {"rows": rows}, {"rows": rows, "inplace": True}):
        with torch.no_grad():
            assert torch.equal(module(hidden.clone(), **kwargs), hidden)


@pytest.mark.parametrize("name", ["loreft", "direft", "nodireft", "noreft", "lobireft", "red"])
def test_gradient_at_the_identity_is_not_zero(name):
    """The gradient at the identity start is not zero."""
    module = SINGLE[name](D, R, init="identity")
    module(torch.randn(4, D)).pow(2).sum().backward()
    assert sum(p.grad.abs().sum() for p in module.parameters()) > 0


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("consreft", "linear"),
        *(("loreft", a) for a in ACTIVATIONS if a != "linear"),
        ("direft", "relu"),
        ("direft", "sigmoid"),
        ("lobireft", "relu"),
        ("lobireft", "sigmoid"),
    ],
)
def test_no_identity(name, activation):
    with pytest.raises(ValueError, match="^init: got 'identity', but .*; expected 'orthogonal'$"):
        SINGLE[name](D, R, activation=activation, init="identity")
    assert SINGLE[name](D, R, activation=activation).init == "orthogonal"


@pytest.mark.parametrize("parametrization", ["householder", "cayley"])
@pytest.mark.parametrize("name", ORTHONORMAL)
def test_orthogonal_start_and_set_R(name, parametrization):
    torch.manual_seed(3)
    module = SINGLE[name](D, R, parametrization=parametrization, init="orthogonal")
    torch.manual_seed(3)
    again = SINGLE[name](D, R, parametrization=parametrization, init="orthogonal")
    assert rk.orthonormality_error(module.R) <= 1e-6
    assert all(
        torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True)
    )
    wanted = torch.linalg.qr(torch.randn(D, R, dtype=torch.float64)).Q.mT
    module.set_R(wanted)
    assert (module.R - wanted).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_set_R_refuses():
    module = rk.LoReFT(D, R)
    before = module.R.clone()
    with pytest.raises(ValueError, match=r"^R: got shape \(12, 3\), expected \(3, 12\)"):
        module.set_R(before.mT)
    with pytest.raises(ValueError, match="^R: rows are not orthonormal"):
        module.set_R(2 * before)
    with pytest.raises(TypeError, match="^NodiReFT has no orthonormal R"):
        rk.NodiReFT(D, R).set_R(before)
    assert torch.equal(module.R, before)


# stacked modules


@pytest.mark.parametrize(
    ("parametrization", "activation"), [("householder", "linear"), ("cayley", "gelu")]
)
@pytest.mark.parametrize("name", CLASSES)
def test_stacked_equals_single_ones(name, parametrization, activation, backend, device):
    kwargs = _arguments(name, parametrization=parametrization, activation=activation)
    stacked = _perturbed(CLASSES[name](L, D, R, device=device, **kwargs))
    singles = []
    for i in range(L):
        single = SINGLE[name](D, R, device=device, **kwargs)
        single.load_state_dict({k: t[i] for k, t in stacked.state_dict().items()})
        singles.append(single)
    hidden = torch.randn(4, D, device=device)
    grads = torch.randn(L, 4, D, device=device)
    built = stacked()
    assert len(built) == L
    outs = [stacked.edit(hidden, weights) for weights in built]
    sum((out * g).sum() for out, g in zip(outs, grads, strict=True)).backward()
    for i, single in enumerate(singles):
        out = single(hidden)
        assert torch.equal(out, outs[i])
        (out * grads[i]).sum().backward()
        for key, p in single.named_parameters():
            assert torch.equal(p.grad, stacked.get_parameter(key).grad[i]), key


@pytest.mark.parametrize("name", ORTHONORMAL)
def test_one_operator_call_builds_all_layers_forward_and_backward(name):
    stacked = CLASSES[name](L, D, R)
    hidden = torch.randn(4, D)
    with Calls() as calls:
        built = stacked()
        out = sum(stacked.edit(hidden, weights).sum() for weights in built)
    assert [n for n in calls.engine if n == "householder"] == ["householder"]
    with Calls() as calls:
        out.backward()
    assert calls.engine.count("householder_backward") == 1
    # one stack per parameter; slicing would fill a zero tensor of all layers for each layer
    assert not any(
        "select_backward" in n or "slice_backward" in n or n == "aten::zeros" for n in calls.all
    )


def test_linear_loreft_is_one_projection():
    """D = W - R is computed when the weights are built, so the edit subtracts nothing."""
    weights = rk.LoReFT(D, R).build()[0]
    assert weights.subtract_projection is False and torch.equal(
        weights.read, torch.zeros_like(weights.read)
    )


@pytest.mark.parametrize("name", SINGLE)
def test_num_sets(name, backend, device):
    """Each row is edited as by a module with only its weight set."""
    module = _perturbed(SINGLE[name](D, R, num_sets=2, device=device))
    hidden = torch.randn(6, D, device=device)
    weight_ids = torch.tensor([0, 1, 1, 0, 1, 0], dtype=torch.int32, device=device)
    out = module(hidden, weight_ids=weight_ids)
    for s in range(2):
        single = SINGLE[name](D, R, device=device)
        single.load_state_dict({k: t[s] for k, t in module.state_dict().items()})
        torch.testing.assert_close(out[weight_ids == s], single(hidden[weight_ids == s]))
    for wrong in (None, weight_ids[:3]):
        with pytest.raises(ValueError, match="^weight_ids: got"):
            module(hidden, weight_ids=wrong)
    with pytest.raises(ValueError, match="^weight_ids: got a tensor, expected None"):
        SINGLE[name](D, R, device=device)(hidden, weight_ids=weight_ids)


# built weights are cached while nothing changes


def _builds(module) -> int:
    with Calls() as calls, torch.no_grad():
        module.build()
    return sum(n in ("householder", "cayley") for n in calls.engine)


def _in_place(module):
    with torch.no_grad():
        module.X.add_(0.5)


def _load(module):
    module.load_state_dict(_perturbed(copy.deepcopy(module)).state_dict())


def _to(module):
    module.to(torch.float64)


def _set_R(module):
    module.set_R(module.R.flip(-1))


def _replace(module):
    module.X = torch.nn.Parameter(module.X.detach().clone() + 0.1)


def _bias(module):
    with torch.no_grad():
        module.b.add_(1)


def _train(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    weights = module.build()[0]
    module.edit(torch.randn(4, D), weights).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [_in_place, _load, _to, _set_R, _replace, _bias, _train],
    ids=lambda change: change.__name__[1:],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_no_build_until_something_changes(stacked, change):
    module = (interventions.StackedLoReFT(L, D, R) if stacked else rk.LoReFT(D, R)).eval()
    assert _builds(module) == 1
    assert _builds(module) == 0
    with torch.no_grad():
        before = [t.clone() for t in module.build()[0][:3]]
    change(module)
    assert _builds(module) == 1
    assert _builds(module) == 0
    with torch.no_grad():
        after = module.build()[0]
        fresh = copy.deepcopy(module).build()[0]
    assert all(torch.equal(a, b) for a, b in zip(after[:3], fresh[:3], strict=True))
    assert any(
        a.dtype != b.dtype or not torch.equal(a, b) for a, b in zip(before, after[:3], strict=True)
    )


def test_frozen_parameters_are_built_once_even_with_gradients_on():
    module = rk.LoReFT(D, R).requires_grad_(False)
    hidden = torch.randn(4, D, requires_grad=True)
    with Calls() as calls:
        for _ in range(3):
            module(hidden).sum().backward()
    assert calls.engine.count("householder") == 1


def test_training_builds_each_time():
    module = rk.LoReFT(D, R)
    with Calls() as calls:
        for _ in range(2):
            module(torch.randn(4, D)).sum().backward()
    assert calls.engine.count("householder") == 2


def test_built_in_inference_mode_then_trained():
    module = rk.LoReFT(D, R)
    hidden = torch.randn(4, D)
    with torch.inference_mode():
        module(hidden)
    with torch.no_grad():
        module(hidden)
    module.requires_grad_(False)
    leaf = hidden.clone().requires_grad_()
    module(leaf).sum().backward()
    assert leaf.grad is not None


# dropout


@pytest.mark.parametrize("name", FAMILY)
def test_dropout_acts_on_u_alone(name, backend, device):
    module = _perturbed(SINGLE[name](D, R, dropout=0.5, device=device))
    hidden = torch.randn(24, D, device=device)
    torch.manual_seed(5)
    mask = torch.empty(24, R, device=device).bernoulli_(0.5) * 2
    torch.manual_seed(5)
    with torch.no_grad():
        trained = module(hidden)
        assert torch.equal(trained, module.eval()(hidden, coeff=mask))
        dropped = (mask == 0).all(1)
        assert dropped.any() and torch.equal(trained[dropped], hidden[dropped])
        assert torch.equal(module(hidden), module(hidden))


def test_dropout_multiplies_coeff():
    module = _perturbed(rk.LoReFT(D, R, dropout=0.25))
    coeff = torch.rand(8, R, requires_grad=True)
    hidden = torch.randn(8, D)
    torch.manual_seed(5)
    mask = torch.empty(8, R).bernoulli_(0.75) / 0.75
    torch.manual_seed(5)
    out = module(hidden, coeff=coeff)
    assert torch.equal(out, module.eval()(hidden, coeff=mask * coeff))
    out.sum().backward()
    assert (coeff.grad[mask == 0] == 0).all()


# state


@pytest.mark.parametrize("name", SINGLE)
def test_pickle_and_deepcopy(name):
    module = _perturbed(SINGLE[name](D, R)).eval()
    hidden = torch.randn(4, D)
    with torch.no_grad():
        want = module(hidden)
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(other(hidden), want)
            next(other.parameters()).add_(1.0)
            assert not torch.equal(other(hidden), want)
        assert torch.equal(module(hidden), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SINGLE)
def test_dtype_of_parameters_and_of_hidden(name, dtype, backend, device):
    module = SINGLE[name](D, R, dtype=dtype, device=device)
    assert {p.dtype for p in module.parameters()} == {dtype}
    for hidden_dtype in (torch.float32, torch.bfloat16):
        out = module(torch.randn(4, D, device=device).to(hidden_dtype))
        assert out.dtype == hidden_dtype
        out.float().sum().backward()
        assert all(p.grad is None or p.grad.dtype == dtype for p in module.parameters())


@pytest.mark.parametrize("name", CLASSES)
def test_meta_device_then_materialised(name):
    module = CLASSES[name](L, D, R, device="meta")
    assert {p.device.type for p in module.parameters()} == {"meta"}
    module = module.to_empty(device="cpu")
    module.load_state_dict(_perturbed(CLASSES[name](L, D, R)).state_dict())
    assert module.edit(torch.randn(4, D), module()[0]).isfinite().all()


# invalid arguments


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "message"),
    [
        ((0, 1), {}, ValueError, "^embed_dim: got 0, expected an integer >= 1"),
        ((8, 9), {}, ValueError, "^rank: got 9, expected an integer from 1 to 8"),
        ((999, 257), {}, ValueError, "^rank: got 257, expected an integer from 1 to 256"),
        ((8, True), {}, ValueError, "^rank: got True, expected"),
        ((8, 2.0), {}, ValueError, "^rank: got 2.0, expected"),
        (
            (8, 2),
            {"activation": "cube"},
            ValueError,
            "^activation: got 'cube', expected one of linear",
        ),
        ((8, 2), {"dropout": 1.0}, ValueError, "^dropout: got 1.0, expected a probability"),
        ((8, 2), {"dropout": "x"}, ValueError, "^dropout: got 'x', expected"),
        (
            (8, 2),
            {"parametrization": "qr"},
            ValueError,
            "^parametrization: got 'qr', expected one of householder, cayley",
        ),
        (
            (8, 2),
            {"init": "zeros"},
            ValueError,
            "^init: got 'zeros', expected one of identity, orthogonal",
        ),
        (
            (8, 2),
            {"dtype": torch.int32},
            TypeError,
            "^dtype: got torch.int32, expected a floating-point dtype",
        ),
        ((8, 2), {"num_sets": 0}, ValueError, "^num_sets: got 0, expected an integer >= 1"),
    ],
)
def test_bad_arguments(arguments, kwargs, error, message):
    with pytest.raises(error, match=message):
        rk.LoReFT(*arguments, **kwargs)


def test_red_has_no_activation_dropout_or_coeff():
    with pytest.raises(ValueError, match="^activation, dropout: got 'gelu' and 0.0, expected"):
        rk.RED(8, activation="gelu")
    with pytest.raises(ValueError, match="^coeff: got a tensor, expected None"):
        rk.RED(8)(torch.randn(2, 8), coeff=torch.ones(2, 1))


def test_wrong_hidden_is_refused_before_anything_is_written():
    module, hidden = rk.LoReFT(D, R), torch.randn(4, D - 1)
    before = hidden.clone()
    with pytest.raises(ValueError, match=r"^write: got shape \(3, 12\), expected \[r, 11\]"):
        module(hidden, inplace=True)
    assert torch.equal(hidden, before)
    assert checks.num_rows_of(torch.zeros(2, 3, D)) == 6
