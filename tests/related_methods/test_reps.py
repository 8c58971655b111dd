"""RePS against its formula: steering and removal, for each row and each concept."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reft_kernels.related_methods import RePS
from tests.related_methods import common

pytestmark = pytest.mark.usefixtures("poison")
B, T, D, C = 3, 5, 21, 4
SELECTED = (14, 10, -1, 7, 0, 3)
CONCEPTS = (2, 0, 3)


def _plain(rows, null, concepts):
    def formula(hidden, strength, w, b):
        out = []
        for n, h in enumerate(hidden.reshape(-1, D)):
            if rows is not None and n not in rows:
                out.append(h)
                continue
            f = (
                strength[rows.index(n) if rows is not None else n, 0]
                if strength.dim() == 2
                else strength[n // T]
            )
            direction, bias = (
                (w, b) if concepts is None else (w[concepts[n // T]], b[concepts[n // T]])
            )
            if f != 0:
                out.append(h + (f + bias) * direction)
                continue
            along = h @ direction if null == "linear" else torch.relu(h @ direction + bias)
            out.append(h - along / (direction @ direction) * direction)
        return torch.stack(out).view_as(hidden)

    return formula


@pytest.mark.parametrize(
    ("rows", "per_row", "null", "concepts", "inplace"),
    [
        (None, False, "linear", None, False),
        (None, True, "relu", None, True),
        (SELECTED, True, "linear", CONCEPTS, True),
        (SELECTED, False, "relu", CONCEPTS, False),
        (SELECTED, False, "linear", None, True),
    ],
)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_error_budget(dtype, rows, per_row, null, concepts, inplace, backend, device):
    def make():
        module = RePS(D, null=null, num_concepts=None if concepts is None else C, device=device)
        module = common.randomized(module)
        count = B * T if rows is None else len(rows)
        strength = torch.randn((count, 1) if per_row else (B,), device=device)
        strength[1::2] = 0
        fixed = {"rows": None if rows is None else common.rows(device, *rows)}
        if concepts is not None:
            fixed["concepts"] = torch.tensor(concepts, device=device)
        inputs = {"hidden": torch.randn(B, T, D, device=device).to(dtype), "strength": strength}
        return module, inputs, fixed, _plain(rows, null, concepts)

    # a strength of 0 does not enter the formula, so its gradient is 0 in both
    common.check(make, dtype, inplace=inplace, draws=common.draws(backend, device))


def test_gradcheck():
    module = common.randomized(RePS(4, null="relu", dtype=torch.float64))
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    strength = torch.tensor([0.0, 1.5], dtype=torch.float64)

    def edit(hidden, w, b):
        return torch.func.functional_call(module, {"w": w, "b": b}, (hidden, strength))

    assert torch.autograd.gradcheck(edit, (hidden, module.w, module.b))


def test_a_removed_direction_is_gone_and_the_rest_stays():
    module, hidden = RePS(D), torch.randn(B, T, D)
    unit = torch.nn.functional.normalize(module.w.detach(), dim=0)
    with torch.no_grad():
        out = module(hidden, 0.0)
    assert (out @ unit).abs().max() <= 1e-5 < (hidden @ unit).abs().max()
    torch.testing.assert_close(out, hidden - (hidden @ unit).unsqueeze(-1) * unit)


def test_relu_removes_only_what_points_along():
    module = RePS(D, null="relu")
    hidden = torch.stack([module.w.detach(), -module.w.detach()])
    with torch.no_grad():
        out = module(hidden, 0.0)
    assert out[0].abs().max() <= 1e-6 and torch.equal(out[1], hidden[1])


def test_one_launch_for_all_strengths_and_concepts():
    names = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    module = RePS(D, num_concepts=C)
    concepts, strength = torch.tensor(CONCEPTS), torch.tensor([0.0, 1.0, -2.0])
    hidden = torch.randn(B, T, D)
    module(hidden, strength, concepts=concepts)
    with Calls():
        module(hidden, strength, concepts=concepts)
    assert [name for name in names if name.startswith("reft_kernels::")] == ["reft_kernels::edit"]
    assert "aten::aminmax" not in names  # values were checked before, not in the layer


def test_refusals():
    module, many, hidden = RePS(D), RePS(D, num_concepts=C), torch.randn(B, T, D)
    before = hidden.clone()
    for error, message, call in [
        (
            ValueError,
            "^null: got 'half', expected one of linear, relu",
            lambda: RePS(D, null="half"),
        ),
        (
            ValueError,
            "^num_concepts: got 0, expected an integer >= 1",
            lambda: RePS(D, num_concepts=0),
        ),
        (TypeError, "^strength: got NoneType", lambda: module(hidden, None, inplace=True)),
        (
            TypeError,
            "^strength: got shape .*int64",
            lambda: module(hidden, torch.ones(B).long(), inplace=True),
        ),
        (
            ValueError,
            r"^strength: got shape \(2,\), expected \(3,\)",
            lambda: module(hidden, torch.ones(2), inplace=True),
        ),
        (ValueError, "^w: got shape", lambda: module(torch.randn(2, D + 1), 1.0)),
        (ValueError, "^concepts: got NoneType", lambda: many(hidden, 1.0, inplace=True)),
        (
            ValueError,
            "^concepts: got a tensor, expected None",
            lambda: module(hidden, 1.0, concepts=torch.zeros(B).long()),
        ),
        (
            ValueError,
            r"^concepts: got values from 0 to 4, expected \[0, 4\)",
            lambda: many(hidden, 1.0, concepts=torch.tensor([0, 4, 1]), inplace=True),
        ),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(hidden, before)
