"""torch.compile(fullgraph=True): no graph break, and the same outputs and gradients as eager."""

from __future__ import annotations

import pytest
import torch

from reft_kernels.related_methods import BREP, JoLA, LoFiT, ReftR1, RePS
from tests.related_methods import common

D = 12
CALLS = {
    "reft_r1": lambda: (ReftR1(D, topk=2, bias=True), {}),
    "reps": lambda: (
        RePS(D, num_concepts=3),
        {"strength": torch.tensor([0.0, 2.0]), "concepts": torch.tensor([2, 0])},
    ),
    "brep": lambda: (BREP(D, 1), {}),
    "lofit": lambda: (LoFiT(4, 3, (0, 2)), {}),
    "jola": lambda: (JoLA(4, 3).eval(), {}),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_equal_to_eager(name, selected):
    module, kwargs = CALLS[name]()
    common.randomized(module)
    hidden = torch.randn(2, 5, D)
    rows = common.rows("cpu", 7, -1, 1, 2) if selected else None

    def step(hidden, rows):
        return module(hidden * 1.5, rows=rows, **kwargs)

    def run(function):
        leaf = hidden.clone().requires_grad_()
        module.zero_grad()
        out = function(leaf, rows)
        out.sin().sum().backward()
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())]

    want = run(step)
    for got, expected in zip(
        run(torch.compile(step, fullgraph=True, backend="aot_eager")), want, strict=True
    ):
        assert torch.equal(got, expected)
