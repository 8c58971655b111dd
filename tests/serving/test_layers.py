"""Patched decoder layers: which are refused, and what the others return."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reft_kernels.positions import parse
from reft_kernels.serving.bank import Bank
from reft_kernels.serving.errors import AdapterError
from reft_kernels.serving.positions import edited_ranges
from reft_kernels.serving.steps import Edit, Scheduled, build_step
from reft_kernels.serving.vllm import operator
from reft_kernels.serving.vllm.layers import find_layers, patch_layers
from tests.serving.served import adapter

WIDTH = 6


class Plain(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Three(nn.Module):
    def forward(self, hidden_states, residual):
        return hidden_states, residual, None


class Pair(nn.Module):
    """As the layers of vLLM: the sum of what it returns is the block's output."""

    def forward(self, hidden_states, residual):
        return torch.tanh(hidden_states + residual), hidden_states + residual


class Single(nn.Module):
    """Takes a residual and returns one tensor, by a name that its source does not show."""

    def forward(self, hidden_states, residual):
        out = hidden_states + residual
        return out


def _model(*lists) -> nn.Module:
    made = nn.Module()
    for number, layers in enumerate(lists):
        made.add_module(f"list{number}", nn.ModuleList(layers))
    return made


def _step(dtype=torch.float32, bank=None):
    """Edits rows 1, 2 and 5 of 7 in the layers 0 and 1."""
    served = adapter("a", positions="f2+l1")
    bank = Bank((0, 1), WIDTH, 2, 2, "cpu") if bank is None else bank
    edit = Edit("a", edited_ranges(parse("f2+l1"), False, 5))
    return served, build_step([Scheduled(edit, 1, 0, 5)], {"a": served}, bank)


def test_models_of_another_form_are_refused_by_name():
    with pytest.raises(AdapterError, match="list0 \\(Plain\\)"):
        find_layers(_model([Plain(), Plain()]), 2)
    with pytest.raises(AdapterError, match="Three: its forward returns 3 values"):
        find_layers(_model([Three(), Three()]), 2)
    with pytest.raises(AdapterError, match="several lists"):
        find_layers(_model([Pair(), Pair()], [Pair(), Pair()]), 2)
    with pytest.raises(AdapterError, match="got none"):
        find_layers(_model([Pair()]), 2)
    assert list(find_layers(_model([Pair()], [Pair(), Pair()], [Plain(), Plain()]), 2)) == [0, 1]


def test_a_layer_that_returns_something_else_is_refused_when_it_runs():
    layer = Single()
    patch_layers({0: layer})
    with pytest.raises(AdapterError, match="Single: its forward returned something other"):
        layer(torch.randn(7, WIDTH), torch.randn(7, WIDTH))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_sum_of_a_layers_results_is_edited(dtype):
    served, step = _step()
    layers = {0: Pair(), 1: Pair()}
    patch_layers(layers)
    hidden, residual = torch.randn(2, 7, WIDTH).to(dtype)
    plain = Pair()(hidden, residual)
    assert type(layers[1]) is not Pair and isinstance(layers[1], Pair)
    for index, layer in layers.items():
        unedited = layer(hidden, residual)
        with operator.during(step):
            edited = layer(hidden, residual)
        for one, other in zip(unedited, plain, strict=True):
            assert torch.equal(one, other)
        rows = [1, 2, 5]
        others = [0, 3, 4, 6]
        for one, other in zip(edited, plain, strict=True):
            assert torch.equal(one[others], other[others])
        total = (plain[0] + plain[1])[rows].double()
        read, bias, write = (
            t[0, index].double() for t in (served.read, served.read_bias, served.write)
        )
        expected = total + (total @ read.T + bias) @ write
        tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
        got = (edited[0] + edited[1])[rows].double()
        assert float((got - expected).abs().max()) <= tolerance
        assert not edited[1][rows].any()


def test_a_compiled_layer_calls_the_operator_with_the_rows_of_its_step():
    """One graph, compiled without a step, serves steps with and without edits."""
    _, step = _step()
    layers = {0: Pair(), 1: Pair()}
    patch_layers(layers)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layers[1], fullgraph=True, backend="aot_eager")
    hidden, residual = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        for current in (None, step, None, step):
            with operator.during(current):
                expected = layers[1](hidden, residual)
                got = compiled(hidden, residual)
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one, other)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operators_schema_says_what_it_writes():
    served, step = _step()
    hidden, residual = torch.randn(2, 7, WIDTH)
    with operator.during(step):
        torch.library.opcheck(
            torch.ops.reft_kernels_serving.edit.default,
            (hidden, residual, 1),
            test_utils=("test_schema", "test_faketensor"),
        )
