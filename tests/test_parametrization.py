"""Tests of householder and cayley: definitions, base points, inverses, gradients and errors."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from reft_kernels.parametrization import INVERSES, build
from tests import budget, plain

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]

ENGINE = {"householder": rk.householder, "cayley": rk.cayley}
NAMES = sorted(ENGINE)
SHAPES = [(1, 1), (7, 1), (5, 5), (13, 4), (33, 8), (3, 17, 5), (2, 2, 9, 3)]


def _point(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """Return an orthonormal R [..., r, d]."""
    *lead, d, r = shape
    return (
        torch.linalg.qr(torch.randn(*lead, d, r, dtype=torch.float64)).Q.mT.to(dtype).contiguous()
    )


def _signs(X: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand(*X.shape[:-2], X.shape[-1]) < 0.5, -1.0, 1.0).to(X)


# values


@pytest.mark.parametrize("with_signs", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_definition_in_fp64(name, shape, with_signs):
    """Forward and gradient equal the definition to 1e-12.

    householder is torch.linalg.householder_product, cayley the d x d Cayley transform.
    """
    X = torch.randn(*shape, dtype=torch.float64)
    signs = _signs(X) if with_signs else None
    grad = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64)
    want = budget.outputs(lambda X: plain.MAPS[name](X, signs), {"X": X}, grad)
    got = budget.outputs(lambda X: ENGINE[name](X, signs=signs), {"X": X}, grad)
    for key in want:
        assert (got[key] - want[key]).abs().max() <= 1e-12, key


@pytest.mark.parametrize("shape", [(24, 3), (2, 40, 8)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_budget(name, shape, backend, device):
    def make():
        X = (torch.randn(*shape) / shape[-2] ** 0.5).to(device)
        return budget.Draw({"X": X}, ENGINE[name], plain.MAPS[name])

    budget.check(make, torch.float32, draws=2 if backend == "triton" else 8)


@pytest.mark.parametrize("name", NAMES)
def test_error_budget_around_a_base_point(name, backend, device):
    """The reference multiplies base . H0 F(X) with a d x d matrix H0 in plain PyTorch.

    The backend computes H0 = I - V0 T0 V0^T as a product of reflectors.
    """

    def make():
        point = rk.base_point(_point(2, 24, 3, dtype=torch.float32))
        X0, signs = (t.double() for t in rk.householder_inverse(point.R))
        A = X0.tril(-1) + torch.eye(24, 3, dtype=torch.float64)
        tau = 2.0 / (A * A).sum(-2)
        H0 = torch.eye(24, dtype=torch.float64).expand(2, 24, 24)
        for i in reversed(range(3)):
            v = A[..., i : i + 1]
            H0 = H0 - tau[..., i, None, None] * v @ (v.mT @ H0)
        base = type(point)(*(t.to(device) for t in point))

        def formula(X):
            # F with F(0) = E; householder's reflectors give each column the sign -1
            F = plain.MAPS[name](X).mT * (-1 if name == "householder" else 1)
            E = torch.eye(24, 3, dtype=X.dtype)
            return base.R.to(X) + ((H0.to(X) @ (F - E)) * signs.to(X).unsqueeze(-2)).mT

        X = torch.randn(2, 24, 3) / 5
        return budget.Draw(
            {"X": X.to(device)},
            lambda X: ENGINE[name](X, base),
            lambda X: formula(X.cpu()).to(device),
        )

    budget.check(make, torch.float32, draws=2 if backend == "triton" else 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_R_is_fp32_and_orthonormal_for_any_dtype_of_X(name, dtype, backend, device):
    X = (torch.randn(40, 5, device=device) / 4).to(dtype).requires_grad_()
    R = ENGINE[name](X)
    assert R.dtype == torch.float32 and rk.orthonormality_error(R) <= 1e-6
    R.sum().backward()
    assert X.grad.dtype == dtype and X.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_are_not_read(name, backend, device):
    """Entries on and above the diagonal of the top block may be NaN and have gradient zero."""
    X = torch.randn(9, 4, device=device)
    spoiled = X.clone()
    spoiled[torch.ones_like(X).triu().bool()] = float("nan")
    spoiled.requires_grad_()
    R = ENGINE[name](spoiled)
    assert torch.equal(R, ENGINE[name](X))
    R.pow(2).sum().backward()
    assert (spoiled.grad.triu() == 0).all() and spoiled.grad.isfinite().all()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_stacked_equals_single(name, layers, backend, device):
    X, W = torch.randn(layers, 12, 3, device=device), torch.randn(layers, 3, 12, device=device)
    R, D = build(name, X, W)
    for i in range(layers):
        own_R, own_D = build(name, X[i], W[i])
        assert torch.equal(R[i], own_R) and torch.equal(D[i], own_D)
    assert torch.equal(D, W - R)


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_are_bit_identical(name, backend, device):
    X, grad = torch.randn(2, 12, 3, device=device), torch.randn(2, 3, 12, device=device)
    first, second = (budget.outputs(ENGINE[name], {"X": X}, grad) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


# gradients


@pytest.mark.parametrize("form", ["plain", "signs", "base", "W", "signs and W", "base and W"])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, form):
    X = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    W = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) if "W" in form else None
    signs = _signs(X) if "signs" in form else None
    base = rk.base_point(_point(2, 6, 3)) if "base" in form else None

    def function(X, W=None):
        R, D = build(name, X, W, signs=signs, base=base)
        return R if W is None else (R, D)

    assert torch.autograd.gradcheck(function, (X,) if W is None else (X, W))


@pytest.mark.parametrize("used", ["R", "D"])
def test_one_of_the_two_outputs_unused(used):
    X = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    W = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda X, W: build("householder", X, W)[used == "D"], (X, W))


# base points and inverses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_base_point_is_exact_at_zero(name, dtype, backend, device):
    if dtype == torch.float64:
        rk.set_backend("torch")  # the Triton kernels do not support fp64
    R0 = _point(2, 14, 4, dtype=dtype).to(device)
    zero = torch.zeros(2, 14, 4, dtype=dtype, device=device)
    assert torch.equal(ENGINE[name](zero, R0), R0)
    assert torch.equal(ENGINE[name](zero, rk.base_point(R0)), R0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inverse_round_trip(name, shape):
    R = _point(*shape)
    X, signs = INVERSES[name](R)
    assert (ENGINE[name](X, signs=signs) - R).abs().max() <= 1e-12
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert torch.equal(X[..., : shape[-1], :].triu(), torch.zeros_like(X[..., : shape[-1], :]))


@pytest.mark.parametrize("kind", ["identity", "negative", "permutation", "reversed"])
@pytest.mark.parametrize("name", NAMES)
def test_inverse_of_special_points(name, kind):
    R = torch.eye(4, 7, dtype=torch.float64)
    R = {"identity": R, "negative": -R, "permutation": R[[2, 0, 3, 1]], "reversed": R.flip(1)}[kind]
    X, signs = INVERSES[name](R)
    assert (ENGINE[name](X, signs=signs) - R).abs().max() <= 1e-12


def test_orthonormalize_gives_the_nearest():
    R = _point(9, 3)
    assert (rk.orthonormalize(2.5 * R) - R).abs().max() <= 1e-12
    assert rk.orthonormality_error(rk.orthonormalize(torch.randn(2, 3, 9))) <= 1e-6


# invalid arguments


@pytest.mark.parametrize("function", [rk.householder, rk.cayley])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda X: ([1.0],), TypeError, "^X: got list"),
        (lambda X: (X[0],), ValueError, r"^X: got shape \(3,\), expected \[\.\.\., d, r\]"),
        (lambda X: (X.long(),), TypeError, "^X: got dtype torch.int64, expected"),
        (lambda X: (X.mT,), ValueError, "^X: got d = 3, r = 8, expected 1 <= r <= min"),
        (lambda X: (X[:, :0],), ValueError, "^X: got d = 8, r = 0, expected"),
        (lambda X: (torch.zeros(300, 257),), ValueError, "^X: got d = 300, r = 257, expected"),
        (
            lambda X: (X, X),
            ValueError,
            r"^base: got shape \(8, 3\).*expected an orthonormal R of shape \(3, 8\)",
        ),
        (lambda X: (X, 1.0), ValueError, "^base: got float, expected"),
        (
            lambda X: (X, torch.ones(3, 8)),
            ValueError,
            "^R: rows are not orthonormal.*expected at most",
        ),
    ],
)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(*arguments(torch.randn(8, 3)))


def test_bad_signs():
    X = torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"^signs: got shape \(2,\).*expected \(3,\)"):
        rk.householder(X, signs=torch.ones(2))
    with pytest.raises(ValueError, match="^signs: a base point brings its own"):
        rk.householder(X, rk.householder(X), signs=torch.ones(3))
    with pytest.raises(ValueError, match="^R: got shape .*expected"):
        rk.base_point(torch.zeros(8, 3))
