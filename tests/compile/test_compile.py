"""torch.compile(fullgraph=True): same results as eager, also in place, without recompilation."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from tests import inputs, plain
from tests.inputs import Case

D, R = 12, 3
# traces forward and backward as Inductor does, but needs no C++ compiler
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _weights(name: str, case: Case, device: str) -> dict[str, torch.Tensor]:
    if name == "red":
        return {"scale": torch.randn(D, device=device), "bias": torch.randn(D, device=device)}
    return inputs.weights(name, case, device=device)


def _function(name: str):
    return rk.red if name == "red" else plain.MEMBERS[name].function


def _call(name: str, inplace: bool, activation: str):
    kwargs = {} if name == "red" else {"activation": activation}

    def edit(hidden, weights, rows):
        x = hidden * 1.5
        y = _function(name)(x, rows=rows, inplace=inplace, **weights, **kwargs)
        return y, x

    return edit


def _run(edit, hidden, weights, rows):
    leaves = [t.clone().requires_grad_() for t in (hidden, *weights.values())]
    y, x = edit(leaves[0], dict(zip(weights, leaves[1:], strict=True)), rows)
    y.sin().sum().backward()
    return [y.detach(), x.detach(), *(t.grad for t in leaves)]


def _equal(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize("name", [*plain.MEMBERS, "red"])
def test_equal_to_eager(name, selected, inplace, backend, device):
    case = Case((2, 4), D, R, rows=3 if selected else None)
    weights, hidden = _weights(name, case, device), torch.randn(2, 4, D, device=device)
    rows = inputs.rows(8, 3, device=device) if selected else None
    edit = _call(name, inplace, "gelu")
    _equal(
        _run(torch.compile(edit, fullgraph=True, backend=BACKEND), hidden, weights, rows),
        _run(edit, hidden, weights, rows),
    )


@pytest.mark.parametrize("name", ["loreft", "red"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_argument_is_really_edited(name, grad, backend, device):
    weights, rows = _weights(name, Case((2, 4), D, R), device), inputs.rows(8, 3, device=device)
    hidden = torch.randn(2, 4, D, device=device)
    want = _function(name)(hidden, rows=rows, **weights)
    compiled = torch.compile(
        lambda h, w, rows: _function(name)(h, rows=rows, inplace=True, **w),
        fullgraph=True,
        backend=BACKEND,
    )
    weights = {k: w.requires_grad_(grad) for k, w in weights.items()}
    out = compiled(hidden, weights, rows)
    assert torch.equal(hidden, want) and torch.equal(out, want) and out.requires_grad == grad
    if grad:
        out.sum().backward()
        assert all(w.grad is not None for w in weights.values())


@pytest.mark.parametrize("name", ["loreft", "noreft", "red"])
def test_another_number_of_rows_recompiles_nothing(name, backend, device):
    weights = _weights(name, Case((2, 9), D, R), device)
    hidden = torch.randn(2, 9, D, device=device)
    edit = _call(name, True, "linear")
    compiled = torch.compile(edit, fullgraph=True, backend=BACKEND)
    for count in (4, 5):  # the number of rows becomes dynamic at the second call
        _run(compiled, hidden, weights, inputs.rows(18, count, device=device))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 7, 12, 18):
            rows = inputs.rows(18, count, device=device)
            _equal(_run(compiled, hidden, weights, rows), _run(edit, hidden, weights, rows))


def test_rows_marked_dynamic_compile_once(backend, device):
    weights = _weights("loreft", Case((2, 9), D, R), device)
    hidden = torch.randn(2, 9, D, device=device)
    edit = _call("loreft", False, "linear")
    compiled = torch.compile(edit, fullgraph=True, backend=BACKEND)
    for i, count in enumerate((4, 9, 2)):
        rows = inputs.rows(18, count, device=device)
        torch._dynamo.mark_dynamic(rows, 0)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            _equal(_run(compiled, hidden, weights, rows), _run(edit, hidden, weights, rows))


@pytest.mark.parametrize("selected", [True, False])
def test_dynamic_shapes_of_hidden(selected, backend, device):
    weights = _weights("loreft", Case((2, 9), D, R), device)
    edit = _call("loreft", True, "silu")
    compiled = torch.compile(edit, fullgraph=True, dynamic=True, backend=BACKEND)
    for i, (batch, length) in enumerate(((2, 9), (3, 5), (4, 7))):
        hidden = torch.randn(batch, length, D, device=device)
        rows = inputs.rows(batch * length, 2 + i, device=device) if selected else None
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            _equal(_run(compiled, hidden, weights, rows), _run(edit, hidden, weights, rows))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("name", ["householder", "cayley"])
def test_parametrizations(name, with_base, backend, device):
    function, X = getattr(rk, name), torch.randn(2, D, R, device=device)
    base = rk.base_point(rk.householder(torch.randn(2, D, R, device=device))) if with_base else None
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend=BACKEND)):
        leaf = X.clone().requires_grad_()
        R_ = run(leaf, base)
        R_.sin().sum().backward()
        results.append((R_.detach(), leaf.grad))
    _equal(*results)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize(
    "name", ["LoReFT", "DiReFT", "NodiReFT", "NoReFT", "ConsReFT", "LobiReFT", "RED"]
)
def test_modules(name, needs_grad, backend, device):
    """The hidden state is a graph input, because Dynamo drops the history of a modified input."""
    module = getattr(rk, name)(D, R, device=device)
    rows = inputs.rows(8, 3, device=device)
    values = torch.randn(2, 4, D, device=device)
    results = []
    for run in (module, torch.compile(module, fullgraph=True, backend=BACKEND)):
        module.zero_grad()
        leaf = values.clone().requires_grad_(needs_grad)
        hidden = leaf * 1
        out = run(hidden, rows=rows, inplace=True)
        (out.sin() + hidden.cos()).sum().backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        assert grads
        results.append(
            [
                out.detach(),
                hidden.detach(),
                *(g.clone() for g in grads),
                *([leaf.grad] if needs_grad else []),
            ]
        )
    _equal(*results)


def test_two_layers_from_one_stacked_build(backend, device):
    from reft_kernels.interventions import StackedLoReFT

    module = StackedLoReFT(2, D, R, device=device)

    def model(x, rows):
        built = module()
        for weights in built:
            x = x + module.edit(x.tanh() * 1, weights, rows=rows, inplace=True)
        return x

    rows, hidden = inputs.rows(8, 3, device=device), torch.randn(2, 4, D, device=device)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend=BACKEND)):
        module.zero_grad()
        out = run(hidden, rows)
        out.sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in module.parameters())])
    _equal(*results)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("selected", [True, False])
def test_inductor(selected, inplace):
    weights, hidden = _weights("loreft", Case((2, 4), D, R), "cpu"), torch.randn(2, 4, D)
    rows = inputs.rows(8, 3) if selected else None
    edit = _call("loreft", inplace, "gelu")
    got, want = (
        _run(run, hidden, weights, rows) for run in (torch.compile(edit, fullgraph=True), edit)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
