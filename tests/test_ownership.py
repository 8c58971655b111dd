"""A backward edits the incoming gradient in place only if nothing else references it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import reft_kernels as rk
from reft_kernels import ownership
from tests import inputs
from tests.inputs import Case

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]

D = 12
CASES = {"rows": Case((2, 5), D, 3, rows=4), "all": Case((2, 5), D, 3)}


class Calls(TorchDispatchMode):
    """Record the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Problem:
    """One edit of ``[2, 5, d]`` hidden states, with the tensors that the scenarios need."""

    def __init__(self, kind: str, device: str) -> None:
        torch.manual_seed(1)
        case = CASES["rows" if kind.endswith("rows") else "all"]
        self.rows = inputs.rows(10, case.rows, device=device) if case.rows else None
        if kind.startswith("red"):
            self.weights = [torch.randn(D, device=device, requires_grad=True) for _ in range(2)]
            self.function = rk.red
        else:
            weights = inputs.weights("loreft", case, device=device)
            self.weights = [weights[k].requires_grad_() for k in "RWb"]
            self.function = rk.loreft
        self.leaf = torch.randn(2, 5, D, device=device, requires_grad=True)
        self.other = torch.randn(2, 5, D, device=device, requires_grad=True)
        self.weight = torch.randn(2, 5, D, device=device)

    def edit(self, inplace: bool = False) -> torch.Tensor:
        return self.function(self.leaf * 1, *self.weights, rows=self.rows, inplace=inplace)


KINDS = ["loreft-rows", "loreft-all", "red-rows", "red-all"]


# scenarios of shared gradients; each returns every tensor to check


def _sum_of_two(p, y):
    """Another node receives the same gradient, after the edit's backward has run."""
    c = p.other * 1
    ((y + c) * p.weight).sum().backward()
    return [p.other.grad]


def _add_first(p, y):
    """Another node receives the same gradient from the root, before the edit's backward."""
    (y + p.other).backward(p.weight.clone())
    return [p.other.grad]


def _hook_keeps(p, y):
    held = []
    y.register_hook(held.append)
    (y * p.weight).sum().backward()
    return held


def _node_hook_keeps(p, y):
    held = []
    y.grad_fn.register_prehook(lambda grads: held.extend(grads))
    (y * p.weight).sum().backward()
    return held


def _retain_grad(p, y):
    y.retain_grad()
    (y * p.weight).sum().backward()
    return [y.grad]


def _users_gradient(p, y):
    given = p.weight.clone()
    y.backward(given)
    return [given]


def _users_gradient_of_a_view(p, y):
    given = p.weight.clone().view(-1)
    y.view(-1).backward(given)
    return [given]


def _autograd_grad(p, y):
    grads = torch.autograd.grad((y * p.weight).sum(), [y, p.leaf, *p.weights])
    p.leaf.grad = grads[1]
    return list(grads)


def _retain_graph(p, y):
    loss = (y * p.weight).sum()
    loss.backward(retain_graph=True)
    first = [p.leaf.grad.clone(), *(w.grad.clone() for w in p.weights)]
    loss.backward()
    return first


def _expanded(p, y):
    y.sum().backward()
    return []


def _broadcast_row(p, y):
    (y * p.weight[:, :1]).sum(1).sum().backward()
    return []


def _saved_by_exp(p, y):
    """exp's backward multiplies by its saved output, which must not change."""
    e = (y * 0.1).exp()
    loss = (e * p.weight).sum()
    loss.backward(retain_graph=True)
    e.sum().backward()
    return [e]


def _identity_nodes(p, y):
    """View nodes pass the gradient on to a second consumer."""
    c = p.other * 1
    z = y.view(10, D) + c.view(10, D)
    (z.view(2, 5, D) * p.weight).sum().backward()
    return [p.other.grad]


def _global_keeper(p, y):
    """A custom function returns a gradient that it also stores."""
    kept = p.weight.clone()

    class Keeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return kept

    Keeper.apply(y).backward()
    return [kept]


def _buffer_of_numpy(p, y):
    """A gradient shares its memory with another tensor object."""
    given = p.weight.clone()
    alias = given.detach()
    y.backward(given)
    return [given, alias]


SCENARIOS = [
    _sum_of_two,
    _add_first,
    _hook_keeps,
    _node_hook_keeps,
    _retain_grad,
    _users_gradient,
    _users_gradient_of_a_view,
    _autograd_grad,
    _retain_graph,
    _expanded,
    _broadcast_row,
    _saved_by_exp,
    _identity_nodes,
    _global_keeper,
    _buffer_of_numpy,
]


def _run(scenario, kind: str, device: str, inplace: bool) -> list[torch.Tensor]:
    p = Problem(kind, device)
    held = scenario(p, p.edit(inplace))
    return [*held, p.leaf.grad, *(w.grad for w in p.weights if w.grad is not None)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__[1:])
def test_a_shared_gradient_is_not_modified(scenario, kind, inplace, backend, device, monkeypatch):
    if scenario is _saved_by_exp and inplace and kind.endswith("all"):
        scenario = _retain_grad  # over all rows, exp of the edited tensor is the same case
    got = _run(scenario, kind, device, inplace)
    monkeypatch.setattr(ownership, "is_sole_owner", lambda grad: False)
    want = _run(scenario, kind, device, inplace)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_an_owned_gradient_is_edited_in_place(kind, backend, device):
    p = Problem(kind, device)
    loss = ((p.edit() * p.weight) * 2).sum()
    with Calls() as calls:
        loss.backward()
    edits = [name for name in calls.names if "backward" in name and name.startswith("reft_kernels")]
    assert edits == [f"reft_kernels::{kind.split('-')[0].replace('loreft', 'edit')}_backward_"]
    assert "aten::clone" not in calls.names


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_stream_of_edits_copies_no_gradient(kind, backend, device):
    """In two layers x + f(x), every gradient is a sum of two paths and therefore owned."""
    p = Problem(kind, device)
    x = p.leaf
    for _ in range(2):
        x = p.function(x + x.tanh(), *p.weights, rows=p.rows, inplace=p.rows is not None)
    loss = (x * p.weight).sum()
    with Calls() as calls:
        loss.backward()
    assert sum(name.endswith("_backward_") for name in calls.names) == 2
    assert not any(
        name in ("reft_kernels::edit_backward", "reft_kernels::red_backward")
        for name in calls.names
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind, reentrant, backend, device):
    def body(p, x):
        return p.function(x.tanh() + x, *p.weights, rows=p.rows, inplace=True) * 2

    results = []
    for wrapped in (False, True):
        p = Problem(kind, device)
        x = p.leaf * 1
        y = (
            checkpoint(lambda x, p=p: body(p, x), x, use_reentrant=reentrant)
            if wrapped
            else body(p, x)
        )
        (y * p.weight).sum().backward()
        results.append([p.leaf.grad, *(w.grad for w in p.weights)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_differentiating_twice_raises(kind):
    p = Problem(kind, "cpu")
    (grad,) = torch.autograd.grad((p.edit().tanh() * p.weight).sum(), p.leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


_CALIBRATION = """
import torch, reft_kernels as rk
from reft_kernels import ownership
{setup}
with {context}:
    ownership.calibrate()
seen = []
class Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 1
    @staticmethod
    @ownership.once_differentiable
    def backward(ctx, grad):
        seen.append(ownership.is_sole_owner(grad))
        return grad
x = torch.randn(3, device="cpu", requires_grad=True)
(Watch.apply(x) * 2).sum().backward()
y = Watch.apply(x); kept = []; y.register_hook(kept.append); (y * 2).sum().backward()
assert seen == [True, False], seen
"""
_CONTEXTS = {
    "meta": ("", "torch.device('meta')"),
    "autocast": ("", "torch.autocast('cpu', torch.bfloat16)"),
    "hooks": ("", "torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)"),
    "anomaly": ("", "torch.autograd.set_detect_anomaly(True)"),
    "inference": ("", "torch.inference_mode()"),
}


@pytest.mark.parametrize("context", _CONTEXTS)
def test_calibration_does_not_depend_on_where_it_happens(context):
    setup, manager = _CONTEXTS[context]
    script = _CALIBRATION.format(setup=setup, context=manager)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
