"""Row selection: unselected rows are neither read nor written, and edits are deterministic."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from tests import budget, inputs, plain
from tests.inputs import Case

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SELECTED = Case((2, 8), 21, 3, rows=6, coeff=True, activation="gelu")


def _unselected(rows: torch.Tensor, total: int) -> torch.Tensor:
    mask = torch.ones(total, dtype=torch.bool, device=rows.device)
    mask[rows[rows >= 0].long()] = False
    return mask


def _call(name: str, hidden, weights, **fixed):
    return (rk.red if name == "red" else plain.MEMBERS[name].function)(hidden, *weights, **fixed)


def _own(name: str, case: Case, device: str) -> list[torch.Tensor]:
    if name == "red":
        return [torch.randn(case.d, device=device) for _ in range(2)]
    member, weights = plain.MEMBERS[name], inputs.weights(name, case, device=device)
    return [weights[k] for k in (member.write, member.read, member.read_bias) if k is not None]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["loreft", "red"])
def test_unselected_rows_are_bit_identical(name, dtype, inplace, backend, device):
    """Unselected rows may hold NaN, which does not reach other rows or any gradient."""
    rows = inputs.rows(16, 6, device=device)
    outside = _unselected(rows, 16)
    hidden = torch.randn(16, 21, device=device).to(dtype)
    hidden[outside] = float("nan")
    grad = torch.randn(16, 21, device=device).to(dtype)
    grad[outside] = float("nan")
    weights = [w.requires_grad_() for w in _own(name, SELECTED, device)]
    leaf = hidden.clone().requires_grad_()
    given = leaf.clone()
    out = _call(name, given, weights, rows=rows, inplace=inplace)
    assert (out is given) == inplace
    out.backward(grad)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.detach()[outside].view(as_bits), hidden[outside].view(as_bits))
    assert torch.equal(leaf.grad[outside].view(as_bits), grad[outside].view(as_bits))
    assert out.detach()[~outside].isfinite().all() and leaf.grad[~outside].isfinite().all()
    assert all(w.grad.isfinite().all() for w in weights)
    assert not torch.equal(out.detach()[~outside], hidden[~outside])


@pytest.mark.parametrize("name", [*plain.MEMBERS, "red"])
def test_two_runs_are_bit_identical(name, backend, device):
    weights = _own(name, SELECTED, device)
    leaves = {
        "hidden": torch.randn(16, 21, device=device),
        **{str(i): w for i, w in enumerate(weights)},
    }
    rows = inputs.rows(16, 6, device=device)
    grad = torch.randn(16, 21, device=device)

    def run(hidden, **weights):
        return _call(name, hidden, list(weights.values()), rows=rows)

    first, second = (budget.outputs(run, leaves, grad) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_skipped_entries_add_nothing(backend, device):
    """coeff and weight_ids of a skipped entry may be NaN, and its coeff has gradient zero."""
    case = SELECTED
    weights = [w.requires_grad_() for w in _own("noreft", case, device)]
    rows = torch.tensor([-1, 3, -1, 7, 0], dtype=torch.int32, device=device)
    coeff = torch.rand(5, case.r, device=device)
    coeff[rows < 0] = float("nan")
    coeff.requires_grad_()
    hidden = torch.randn(16, case.d, device=device, requires_grad=True)
    rk.noreft(hidden, *weights, rows=rows, coeff=coeff, activation="silu").sum().backward()
    assert all(t.grad.isfinite().all() for t in (*weights, hidden, coeff))
    assert (coeff.grad[rows < 0] == 0).all() and (coeff.grad[rows >= 0] != 0).any()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("total", [0, 4])
@pytest.mark.parametrize("entries", [[], [-1, -1, -1]])
@pytest.mark.parametrize("name", ["loreft", "noreft", "consreft", "red"])
def test_nothing_selected(name, entries, total, inplace, backend, device):
    weights = [w.requires_grad_() for w in _own(name, SELECTED, device)]
    leaf = torch.randn(total, 21, device=device, requires_grad=True)
    rows = torch.tensor(entries, dtype=torch.int32, device=device)
    out = _call(name, leaf.clone(), weights, rows=rows, inplace=inplace)
    grad = torch.randn(total, 21, device=device)
    out.backward(grad)
    assert torch.equal(out, leaf) and torch.equal(leaf.grad, grad)
    assert all((w.grad == 0).all() for w in weights)


@pytest.mark.parametrize("name", ["loreft", "noreft", "lobireft", "red"])
def test_empty_hidden(name, backend, device):
    weights = [w.requires_grad_() for w in _own(name, SELECTED, device)]
    leaf = torch.randn(2, 0, 21, device=device, requires_grad=True)
    out = _call(name, leaf, weights)
    out.sum().backward()
    assert out.shape == leaf.grad.shape == leaf.shape
    assert all((w.grad == 0).all() for w in weights)


def test_nan_in_a_selected_row_stays_in_it(backend, device):
    weights = _own("loreft", SELECTED, device)
    hidden = torch.randn(16, 21, device=device)
    hidden[3] = float("nan")
    out = rk.loreft(
        hidden, *weights, rows=torch.tensor([3, 5, -1], dtype=torch.int32, device=device)
    )
    assert out[3].isnan().all() and out[torch.arange(16) != 3].isfinite().all()


def test_relu_passes_nan(backend, device):
    hidden = torch.randn(4, 21, device=device)
    hidden[1] = float("nan")
    assert rk.direft(hidden, *_own("direft", SELECTED, device), activation="relu")[1].isnan().all()
