"""Tests of fold() and merge_linear().

A folded edit equals the edit. A merge is exact up to rounding, and unmerging restores every bit.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import reft_kernels as rk
from reft_kernels import interventions
from reft_kernels.folding import fold, merge_linear
from tests import budget, plain

pytestmark = pytest.mark.engine

D, R, L = 20, 3, 2
SINGLE = {
    name: getattr(rk, cls.__name__.removeprefix("Stacked"))
    for name, cls in interventions.STACKED.items()
    if name != "red"
}


def _random(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape).to(p))
    return module


def _own(module) -> dict[str, torch.Tensor]:
    """Return the weights by the names of the plain formula."""
    member = plain.MEMBERS[type(module).__name__.lower().removeprefix("stacked")]
    names = [n for n in (member.write, member.read, member.read_bias) if n is not None]
    return {name: getattr(module, name).detach() for name in names}


def _apply(folded, hidden, weight_ids=None):
    if folded.read is None:
        return rk.lobireft(hidden, folded.write, folded.read_bias, weight_ids=weight_ids)
    return rk.nodireft(hidden, folded.write, folded.read, folded.read_bias, weight_ids=weight_ids)


def _draw(name, folded, weights, weight_ids=None):
    """Return a draw that compares the folded edit with the plain formula."""
    return budget.Draw(
        {"hidden": torch.randn(3, 4, D, device=folded.write.device)},
        lambda hidden: _apply(folded, hidden, weight_ids),
        lambda hidden: plain.edit(
            name, hidden, {k: t.to(hidden) for k, t in weights.items()}, weight_ids=weight_ids
        ),
    )


# fold


@pytest.mark.parametrize("name", SINGLE)
def test_folded_edit_is_the_edit(name, backend, device):
    def make():
        module = _random(SINGLE[name](D, R, device=device))
        return _draw(name, fold(module), _own(module))

    budget.check(make, torch.float32, draws=3, backward=False)


@pytest.mark.parametrize("name", SINGLE)
def test_the_tensors_are_what_the_formulas_say(name):
    module = _random(SINGLE[name](D, R, dtype=torch.float64))
    weights, folded = _own(module), fold(module)
    member = plain.MEMBERS[name]
    write = weights[member.write]
    want = weights[member.read] if member.read else torch.zeros_like(write)
    want = want - write if member.subtract_projection else want
    assert folded.read is None if name == "lobireft" else torch.equal(folded.read, want)
    assert torch.equal(folded.write, write)
    assert torch.equal(folded.read_bias, weights[member.read_bias])


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("name", SINGLE)
def test_stacked_gives_one_for_each_layer(name, layer):
    def make():
        stacked = _random(interventions.STACKED[name](L, D, R))
        layers = fold(stacked)
        assert isinstance(layers, list) and len(layers) == L
        return _draw(name, layers[layer], {k: t[layer] for k, t in _own(stacked).items()})

    budget.check(make, torch.float32, backward=False)


def test_weight_sets_keep_their_dimension():
    def make():
        module = _random(rk.LoReFT(D, R, num_sets=2))
        folded = fold(module)
        assert folded.read.shape == folded.write.shape == (2, R, D) and folded.read_bias.shape == (
            2,
            R,
        )
        return _draw("loreft", folded, _own(module), torch.randint(0, 2, (12,), dtype=torch.int32))

    budget.check(make, torch.float32, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_without_gradient_in_fp32(dtype):
    module = rk.NodiReFT(D, R, dtype=dtype)
    folded = fold(module)
    before = [t.clone() for t in folded]
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in folded)
    _random(module)
    assert all(torch.equal(a, b) for a, b in zip(folded, before, strict=True))
    assert not torch.equal(fold(module).read, before[0])


def test_fold_refuses():
    with pytest.raises(ValueError, match="^intervention: got activation 'gelu', expected 'linear'"):
        fold(rk.LoReFT(D, R, activation="gelu"))
    with pytest.raises(TypeError, match="^intervention: got RED"):
        fold(rk.RED(D))
    with pytest.raises(TypeError, match="^intervention: got Linear, expected one of the family"):
        fold(nn.Linear(D, D))


# merge

MERGED = [*SINGLE, "red"]


def _edit(name, module):
    weights = (
        {"scale": module.scale.detach(), "bias": module.bias.detach()}
        if name == "red"
        else _own(module)
    )

    def edit(h):
        cast = {k: t.to(h) for k, t in weights.items()}
        return plain.red(h, **cast) if name == "red" else plain.edit(name, h, cast)

    return edit


def _intervention(name, **kwargs):
    return _random(rk.RED(D, **kwargs) if name == "red" else SINGLE[name](D, R, **kwargs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MERGED)
def test_merge_is_exact_to_fp32_noise(name, bias):
    def make():
        linear, module = nn.Linear(13, D, bias=bias), _intervention(name)
        edit = _edit(name, module)
        W, b = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else None

        def straightforward(x):
            h = x @ W.to(x).mT
            return edit(h if b is None else h + b.to(x))

        merge_linear(linear, module)
        return budget.Draw({"x": torch.randn(7, 13)}, lambda x: linear(x), straightforward)

    budget.check(make, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MERGED)
def test_unmerge_restores_every_bit(name, bias, dtype):
    linear = nn.Linear(13, D, bias=bias).to(dtype)
    weight, x = linear.weight, torch.randn(4, 13, dtype=dtype)
    before, state = linear(x), {k: t.clone() for k, t in linear.state_dict().items()}
    merged = merge_linear(linear, _intervention(name))
    assert not torch.equal(linear(x), before) and linear.bias is not None
    merged.unmerge()
    assert linear.weight is weight and (linear.bias is not None) == bias
    assert linear.state_dict().keys() == state.keys()
    assert all(torch.equal(linear.state_dict()[k], t) for k, t in state.items())
    assert torch.equal(linear(x), before)
    with pytest.raises(RuntimeError, match="^unmerge: the saved copy was put back before"):
        merged.unmerge()


def test_merges_undone_in_reverse_order():
    linear = nn.Linear(13, D)
    before = linear.weight.detach().clone()
    first = merge_linear(linear, _intervention("loreft"))
    between = linear.weight.detach().clone()
    second = merge_linear(linear, _intervention("direft"))
    second.unmerge()
    assert torch.equal(linear.weight, between)
    first.unmerge()
    assert torch.equal(linear.weight, before)


def test_a_layer_of_a_stack():
    def make():
        stack, linear = _random(interventions.StackedLoReFT(L, D, R)), nn.Linear(13, D)
        weights = {k: t[1] for k, t in _own(stack).items()}
        W, b = linear.weight.detach().clone(), linear.bias.detach().clone()

        def straightforward(x):
            return plain.edit(
                "loreft", x @ W.to(x).mT + b.to(x), {k: t.to(x) for k, t in weights.items()}
            )

        merge_linear(linear, stack, 1)
        return budget.Draw({"x": torch.randn(7, 13)}, lambda x: linear(x), straightforward)

    budget.check(make, torch.float32)


class _Block(nn.Module):
    """A block that adds the output of a linear layer to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 30), nn.Linear(30, D)

    def forward(self, h):
        return h + self.down(self.up(h).relu())


@pytest.mark.parametrize(("name", "exact"), [("lobireft", True), ("loreft", False)])
def test_lobireft_of_a_block_output_merges_and_loreft_does_not(name, exact):
    def make():
        block, module = _Block(), _intervention(name)
        edit, before = _edit(name, module), copy.deepcopy(block)
        merge_linear(block.down, module)
        # an exact merge changes only the bias
        assert not exact or torch.equal(block.down.weight, before.down.weight)

        def straightforward(h):
            weights = {k: t.detach().to(h) for k, t in before.named_parameters()}
            return edit(torch.func.functional_call(before, weights, (h,)))

        return budget.Draw({"h": torch.randn(4, D)}, lambda h: block(h), straightforward)

    with (
        contextlib.nullcontext()
        if exact
        else pytest.raises(AssertionError, match="over the budget")
    ):
        budget.check(make, torch.float32)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (
            lambda: (nn.Linear(13, D), rk.LoReFT(D, R, activation="gelu")),
            {},
            "its activation 'gelu' is not linear",
        ),
        (
            lambda: (nn.Linear(13, D), rk.LoReFT(D, R)),
            {"positions": "f3"},
            "it edits chosen positions",
        ),
        (lambda: (nn.LayerNorm(D), rk.LoReFT(D, R)), {}, "'module' is a LayerNorm"),
        (
            lambda: (nn.Linear(13, D), rk.LoReFT(D, R, num_sets=2)),
            {},
            "its weight set is chosen for each row",
        ),
        (
            lambda: (nn.Linear(13, D + 1), rk.LoReFT(D, R)),
            {},
            "^intervention: got embed_dim 20, expected 21",
        ),
        (lambda: (nn.Linear(13, D), rk.LoReFT(D, R)), {"layer": 0}, "^layer: got 0, expected None"),
        (
            lambda: (nn.Linear(13, D), interventions.StackedLoReFT(L, D, R)),
            {},
            "^layer: got None, expected a layer number",
        ),
        (
            lambda: (nn.Linear(13, D), interventions.StackedLoReFT(L, D, R)),
            {"layer": 2},
            r"^layer: got 2, expected a layer number in \[0, 2\)",
        ),
    ],
)
def test_merge_refuses_with_the_reason_and_changes_nothing(make, kwargs, message):
    module, intervention = make()
    before = {k: t.clone() for k, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_linear(module, intervention, **kwargs)
    assert all(torch.equal(module.state_dict()[k], t) for k, t in before.items())


def test_merge_refuses_what_is_no_intervention_or_not_finite():
    linear = nn.Linear(13, D)
    before = linear.weight.detach().clone()
    with pytest.raises(TypeError, match="^intervention: got Linear"):
        merge_linear(linear, nn.Linear(D, D))
    broken = rk.DiReFT(D, R)
    with torch.no_grad():
        broken.W.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        merge_linear(linear, broken)
    assert torch.equal(linear.weight, before)
