"""Banks: the weights of several adapters as padded sets of one edit, on every backend."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from reft_kernels.arguments import BuiltWeights
from reft_kernels.interventions import STACKED
from reft_kernels.interventions.banks import Bank, formula_of

pytestmark = pytest.mark.engine
D, ROWS = 12, 9
GROUPS = {
    "linear": [("loreft", 3, {}), ("nodireft", 6, {}), ("direft", 2, {"num_sets": 2})],
    "subtracting": [("loreft", 5, {"activation": "gelu"}), ("noreft", 2, {"activation": "gelu"})],
    "constant": [("lobireft", 2, {"activation": "tanh"}), ("lobireft", 4, {"activation": "tanh"})],
    "red": [("red", 1, {}), ("red", 1, {"num_sets": 2})],
}


def stacks_of(group: str, layers: int = 1) -> list:
    stacks = []
    for name, rank, options in GROUPS[group]:
        init = {} if name == "red" else {"init": "orthogonal"}
        stack = STACKED[name](layers, D, rank, **options, **init)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        stacks.append(stack)
    return stacks


def chosen_rows(bank: Bank) -> tuple[torch.Tensor, torch.Tensor]:
    """All sets in turn, and a skipped entry."""
    rows = torch.tensor([4, 0, 7, 2, 8, -1, 5, 1], dtype=torch.int32)
    return rows, torch.arange(len(rows), dtype=torch.int32) % bank.num_sets


def together(stacks, hidden):
    bank = Bank(stacks, [(0,)] * len(stacks))
    rows, ids = (t.to(hidden.device) for t in chosen_rows(bank))
    (weights,) = bank()
    return bank.edit(hidden, weights, rows=rows, weight_ids=ids)


def one_by_one(stacks, hidden):
    """Each adapter's own edit of its own rows."""
    bank = Bank(stacks, [(0,)] * len(stacks))
    rows, ids = (t.to(hidden.device) for t in chosen_rows(bank))
    built = [stack() for stack in stacks]
    for stack, (weights,), first in zip(stacks, built, bank.first_sets, strict=True):
        mine = (ids >= first) & (ids < first + (stack.num_sets or 1))
        own = None if stack.num_sets is None else ids[mine] - first
        hidden = stack.edit(hidden, weights, rows=rows[mine], weight_ids=own)
    return hidden


def results(function, stacks, hidden, grad):
    hidden = hidden.clone().requires_grad_()
    parameters = [p for stack in stacks for p in stack.parameters()]
    out = function(stacks, hidden)
    return [out.detach(), *torch.autograd.grad(out, [hidden, *parameters], grad)]


def draw(group, device):
    stacks = [stack.to(device) for stack in stacks_of(group)]
    return stacks, torch.randn(ROWS, D, device=device), torch.randn(ROWS, D, device=device)


@pytest.mark.parametrize("group", GROUPS)
def test_a_bank_edits_as_its_adapters_do(group, backend, device):
    """Within the error budget of tests/budget.py; what is allowed is the largest of eight draws."""
    allowed: list[float] = []
    for number in range(8):
        stacks, hidden, grad = draw(group, device)
        if number == 0:
            assert len({formula_of(stack, stack()[0]) for stack in stacks}) == 1
            got = results(together, stacks, hidden, grad)
            alone = results(one_by_one, stacks, hidden, grad)
        with rk.backend("torch"):
            plain = results(one_by_one, stacks, hidden, grad)
            doubled = [stack.double() for stack in stacks]
            exact = results(one_by_one, doubled, hidden.double(), grad.double())
        if number == 0:
            errors = [float((g.double() - e).abs().max()) for g, e in zip(got, exact, strict=True)]
            assert torch.equal(got[0][[3, 6]], hidden[[3, 6]])  # not selected
        limits = [
            float(2 * (p.double() - e).abs().max() + torch.finfo(p.dtype).eps * e.abs().max())
            for p, e in zip(plain, exact, strict=True)
        ]
        allowed = limits if number == 0 else list(map(max, allowed, limits))
    assert all(error <= limit for error, limit in zip(errors, allowed, strict=True))
    if backend == "cpu":  # zero rows behind a matrix change no bit
        assert torch.equal(got[0], alone[0])


def test_built_weights_and_formulas():
    linear, gelu = stacks_of("linear", layers=2), stacks_of("subtracting")
    with torch.no_grad():
        weights = Bank(linear, [(1, 0), (0, 1), (1, 1)])()
    assert all(type(w) is BuiltWeights and w.rounded is not None for w in weights)
    assert weights[0].write.shape == (4, 6, D) and weights[0].read_bias.shape == (4, 6)
    with torch.no_grad():
        assert torch.equal(weights[0].write[0, :3], linear[0]()[1].write)
        assert not weights[0].write[0, 3:].any()
        assert torch.equal(weights[1].write[2:, :2], linear[2]()[1].write)
    formulas = {formula_of(s, s()[0]) for s in (linear[0], gelu[0], stacks_of("red")[0])}
    assert len(formulas) == 3
