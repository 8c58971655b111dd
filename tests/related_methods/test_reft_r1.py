"""ReFT-r1 against its formula: mean of the top k ReLU latents times a unit direction."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.related_methods import ReftR1
from tests.related_methods import common

pytestmark = pytest.mark.usefixtures("poison")
B, T, D = 3, 5, 21
SELECTED = (14, 10, -1, 12, 0, 3, 2, 1)  # in any order; example 1 has no selected row


def _plain(rows, topk):
    """Compute the formula token by token, as in the paper."""

    def formula(hidden, weight, bias=None):
        w = weight / weight.norm()
        out = []
        for b, h in enumerate(hidden):
            mine = (
                range(T)
                if rows is None
                else sorted(r - b * T for r in rows if r >= 0 and r // T == b)
            )
            a = torch.relu(h @ w if bias is None else h @ w + bias)[list(mine)]
            if len(a) == 0:
                out.append(h)
                continue
            m = a.sort(descending=True).values[:topk].mean()
            chosen = torch.zeros(T, 1, dtype=h.dtype, device=h.device)
            chosen[list(mine)] = 1
            out.append(h + chosen * (m * w))
        return torch.stack(out)

    return formula


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("rows", "topk", "bias"),
    [(None, 2, False), (None, 9, True), (SELECTED, 2, True), (SELECTED, 9, False)],
)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_error_budget(dtype, rows, topk, bias, inplace, backend, device):
    def make():
        module = common.randomized(ReftR1(D, topk=topk, bias=bias, device=device))
        hidden = torch.randn(B, T, D, device=device).to(dtype)
        fixed = {"rows": None if rows is None else common.rows(device, *rows)}
        return module, {"hidden": hidden}, fixed, _plain(rows, topk)

    common.check(make, dtype, inplace=inplace, draws=common.draws(backend, device))


def test_gradcheck():
    module = ReftR1(4, topk=2, bias=True, dtype=torch.float64)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rows = common.rows("cpu", 0, 4, 2, -1, 5)

    def edit(hidden, weight, bias):
        return torch.func.functional_call(
            module, {"weight": weight, "bias": bias}, (hidden,), {"rows": rows}
        )

    assert torch.autograd.gradcheck(edit, (hidden, module.weight, module.bias))


def test_unselected_rows_are_untouched_and_in_place_writes_nothing_else():
    module, hidden = ReftR1(D), torch.randn(B, T, D)
    rows = common.rows("cpu", *SELECTED)
    with torch.no_grad():
        out = module(hidden, rows=rows)
        same = hidden.clone()
        assert module(same, rows=rows, inplace=True) is same and torch.equal(same, out)
    kept = torch.ones(B * T, dtype=torch.bool)
    kept[rows[rows >= 0].long()] = False
    assert torch.equal(out.view(-1, D)[kept], hidden.view(-1, D)[kept])
    assert not torch.equal(out.view(-1, D)[~kept], hidden.view(-1, D)[~kept])


def test_direction_is_unit_and_has_no_gradient_along_itself():
    """The direction is normalized by construction; the paper's code does it after each backward."""
    module = ReftR1(D, topk=2)
    with torch.no_grad():
        module.weight.mul_(7)
    module(torch.randn(B, T, D)).pow(2).sum().backward()
    assert abs(float(module.direction.detach().norm()) - 1) <= 1e-6
    assert module.weight.grad.norm() > 0
    assert abs(float(module.weight.grad @ module.direction.detach())) <= 1e-6 * float(
        module.weight.grad.norm()
    )


def test_penalty_is_the_sum_outside_the_top_k():
    module = ReftR1(2, topk=2)
    latents = torch.tensor([[3.0, 1.0, 2.0, 0.5], [0.0, 4.0, 0.25, 1.0]], requires_grad=True)
    penalty = module.l1(latents)
    assert float(penalty) == 1.5 + 0.25
    penalty.backward()
    assert latents.grad[0].tolist() == [0, 1, 0, 1] and latents.grad[1].tolist()[2] == 1


def test_latents_detect():
    module = ReftR1(D)
    hidden = torch.stack(
        [module.direction.detach(), -module.direction.detach(), 2 * module.direction.detach()]
    ).unsqueeze(0)
    with torch.no_grad():
        latents = module.latents(hidden, rows=common.rows("cpu", 2, 1))
    torch.testing.assert_close(latents, torch.tensor([[0.0, 0.0, 2.0]]))


@pytest.mark.parametrize(
    "factor",
    [2.5, torch.tensor([0.5, -1.0, 0.0]), torch.randn(2, 1)],
    ids=["number", "example", "row"],
)
def test_steering_with_a_given_strength(factor):
    module, hidden = ReftR1(D), torch.randn(B, T, D)
    rows = common.rows("cpu", 7, 1)
    with torch.no_grad():
        out = module.steer(hidden, factor, rows=rows).view(-1, D)
    want = hidden.clone().view(-1, D)
    for n, row in enumerate(rows.tolist()):
        f = (
            factor
            if isinstance(factor, float)
            else factor[n, 0]
            if factor.dim() == 2
            else factor[row // T]
        )
        want[row] += f * module.direction.detach()
    torch.testing.assert_close(out, want)


def test_refusals():
    with pytest.raises(ValueError, match="^topk: got 0, expected an integer >= 1"):
        ReftR1(D, topk=0)
    module = ReftR1(D)
    with pytest.raises(ValueError, match=r"^hidden: got shape \(6, 21\), expected \[B, T, d\]"):
        module(torch.randn(6, D))
    with pytest.raises(ValueError, match="^weight: got shape"):
        module(torch.randn(2, 3, D + 1))
    with pytest.raises(ValueError, match="^rows: row 1 occurs more than once"):
        module(torch.randn(2, 3, D), rows=common.rows("cpu", 1, 1))
    with pytest.raises(
        ValueError, match=r"^factor: got shape \(5,\), expected \(2,\) for each example"
    ):
        module.steer(torch.randn(2, 3, D), torch.ones(5))
    with pytest.raises(TypeError, match="^factor: got str"):
        module.steer(torch.randn(2, 3, D), "strong")
    leaf = torch.randn(2, 3, D, requires_grad=True)
    with pytest.raises(
        ValueError, match="^hidden: got a leaf that requires grad, expected inplace=False"
    ):
        module(leaf, inplace=True)
