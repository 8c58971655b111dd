"""Autograd behaviour of the edits: required gradients, in-place rules, versions and modes."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from tests import inputs
from tests.inputs import Case

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]

CASE = Case((2, 5), 12, 3, rows=4, activation="gelu")


def _problem(device, case=CASE):
    weights = list(inputs.weights("loreft", case, device=device).values())
    return torch.randn(*case.lead, case.d, device=device), weights, inputs.options(case, device)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wanted", [0b0001, 0b1110, 0b0010, 0b0100, 0b1000, 0b0101, 0b0000])
def test_only_wanted_gradients_are_computed_and_they_do_not_change(
    wanted, inplace, backend, device
):
    hidden, weights, fixed = _problem(device)
    leaves = [hidden, *weights]
    gradients = []
    for mask in (0b1111, wanted):
        fresh = [t.clone().requires_grad_(bool(mask >> i & 1)) for i, t in enumerate(leaves)]
        out = rk.loreft(fresh[0].clone(), *fresh[1:], inplace=inplace, **fixed)
        assert out.requires_grad == bool(mask)
        if mask:
            (out * hidden).sum().backward()
        gradients.append([t.grad for t in fresh])
    for i, (everything, some) in enumerate(zip(*gradients, strict=True)):
        if wanted >> i & 1:
            assert torch.equal(everything, some)
        else:
            assert some is None


def test_coeff_alone(backend, device):
    hidden, weights, fixed = _problem(device)
    coeff = torch.rand(4, 3, device=device, requires_grad=True)
    rk.loreft(hidden, *weights, coeff=coeff, **fixed).sum().backward()
    assert coeff.grad.abs().sum() > 0


@pytest.mark.parametrize("rows", [None, 4])
def test_in_place_equals_out_of_place(rows, backend, device):
    hidden, weights, fixed = _problem(device, CASE._replace(rows=rows))
    copy = hidden.clone()
    with torch.no_grad():
        want = rk.loreft(hidden, *weights, **fixed)
        got = rk.loreft(copy, *weights, inplace=True, **fixed)
    assert got is copy and torch.equal(got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["loreft", "red"])
def test_in_place_counts_as_a_change(name, grad, backend, device):
    """Editing a tensor that another node saved makes that node's backward raise."""
    hidden, weights, fixed = _problem(device)
    x = hidden.requires_grad_() * 1
    y = x.exp()
    with torch.set_grad_enabled(grad):
        if name == "loreft":
            rk.loreft(y, *weights, inplace=True, **fixed)
        else:
            rk.red(y, weights[0][0], weights[0][1], rows=fixed["rows"], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("rows", [None, 4])
def test_the_result_may_be_edited_in_place(rows, backend, device):
    hidden, weights, fixed = _problem(device, CASE._replace(rows=rows, activation="linear"))
    hidden.requires_grad_()
    if rows is None:  # the output is saved for backward, as in tanh, so changing it must raise
        y = rk.loreft(hidden, *weights, **fixed)
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        rk.loreft(hidden, *weights, **fixed).mul_(2).sum().backward()
        twice = hidden.grad.clone()
        hidden.grad = None
        (rk.loreft(hidden, *weights, **fixed) * 2).sum().backward()
        assert torch.equal(twice, hidden.grad)


def _leaf(hidden):
    return hidden.requires_grad_()


def _view_of_a_leaf(hidden):
    return hidden.requires_grad_()[0]


def _one_of_several_views(hidden):
    return (hidden.requires_grad_() * 1).unbind(0)[0]


def _expanded(hidden):
    return hidden[:, :1].expand(2, 5, -1)


def _made_without_gradients(hidden):
    with torch.no_grad():
        return (hidden * 1)[0]


def _inference(hidden):
    with torch.inference_mode():
        return hidden * 1


@pytest.mark.parametrize("name", ["loreft", "red"])
@pytest.mark.parametrize(
    "make",
    [_leaf, _view_of_a_leaf, _one_of_several_views, _expanded, _made_without_gradients, _inference],
    ids=lambda make: make.__name__[1:],
)
def test_an_in_place_edit_that_autograd_refuses_leaves_hidden_as_it_was(
    make, name, backend, device
):
    hidden, weights, _ = _problem(device)
    target = make(hidden)
    before = target.detach().clone()
    weights = [w.requires_grad_() for w in weights]
    with pytest.raises(ValueError, match="^hidden: got .*, expected"):
        if name == "loreft":
            rk.loreft(target, *weights, inplace=True)
        else:
            rk.red(target, weights[0][0], weights[0][1], inplace=True)
    assert torch.equal(target.detach(), before)


def test_a_view_of_an_intermediate_is_edited_in_place(backend, device):
    hidden, weights, _ = _problem(device)
    results = []
    for inplace in (True, False):
        leaf = hidden.clone().requires_grad_()
        base = leaf * 1
        out = rk.loreft(base[1], *weights, inplace=inplace)
        total = base if inplace else torch.stack([base[0], out])
        (total * hidden).sum().backward()
        results.append((total.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [None, 4])
def test_memory_of_any_layout_is_edited_in_place(rows, backend, device):
    """Hidden states that cannot be viewed as rows are edited through a copy."""
    hidden, weights, fixed = _problem(device, CASE._replace(rows=rows))
    with torch.no_grad():
        want = rk.loreft(hidden, *weights, **fixed)
        for layout in (
            hidden.transpose(0, 1).contiguous().transpose(0, 1),
            hidden.mT.contiguous().mT,
        ):
            storage = layout.data_ptr()
            got = rk.loreft(layout, *weights, inplace=True, **fixed)
            assert got is layout and got.data_ptr() == storage and torch.equal(got, want)
