"""Steps of an engine: rows, slots and coefficients, and their edits of hidden states."""

from __future__ import annotations

import pytest
import torch

import reft_kernels as rk
from reft_kernels.positions import parse
from reft_kernels.serving.adapters import Form
from reft_kernels.serving.bank import Bank
from reft_kernels.serving.positions import edited_ranges
from reft_kernels.serving.steps import Edit, Scheduled, build_step
from tests.serving.served import adapter

LAYERS, WIDTH = 3, 6


def _edit(served, length: int, coefficient: float = 1.0, subspaces=None) -> Edit:
    ranges = edited_ranges(served.spec, served.untied, length)
    return Edit(served.hash, ranges, coefficient, subspaces)


def _bank(slots: int = 4) -> Bank:
    return Bank(range(LAYERS), WIDTH, slots, 4, "cpu")


def _apply(step, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    out = hidden.clone()
    for group in step.layers[layer]:
        weights = step.bank.weights(layer, group.form)
        chosen = out[group.rows]
        torch.ops.reft_kernels.edit_(
            chosen, None, group.weight_ids, *weights[:4], group.coeff, weights[4],
            group.form.activation, False,
        )  # fmt: skip
        out[group.rows] = chosen
    return out


def _expected(served, weight_set, layer, hidden, coefficient=1.0, subspaces=None):
    """The edit of each row, in fp64."""
    if layer not in served.layers:
        return hidden
    index = served.layers.index(layer)
    read, bias, write = (
        t[weight_set, index].double() for t in (served.read, served.read_bias, served.write)
    )
    update = hidden.double() @ read.T + bias
    if served.form.activation != "linear":
        update = getattr(torch, served.form.activation)(update)
    if served.form.subtract_projection:
        update = update - hidden.double() @ write.T
    keep = torch.zeros(served.rank, dtype=torch.float64)
    keep[list(range(served.rank) if subspaces is None else subspaces)] = coefficient
    return (hidden.double() + (update * keep) @ write).float()


def test_a_batch_of_chunks_with_several_adapters():
    """Prefill, a second chunk, a decode step and base requests, of adapters of every kind."""
    a = adapter("a", positions="f2+l2", layers=(0, 1, 2))
    b = adapter("b", positions="l1", rank=4, layers=(1,))
    c = adapter("c", positions="all", rank=1, layers=(0, 2), form=Form("relu", True))
    d = adapter("d", positions="f1+l1", rank=3, layers=(0,), untied=True)
    hosts = {x.hash: x for x in (a, b, c, d)}
    scheduled = [
        Scheduled(_edit(a, 5, 0.5), 0, 0, 5),  # whole prompt: columns 0, 1, 3, 4
        Scheduled(_edit(b, 9), 7, 6, 3),  # second chunk: column 8
        Scheduled(_edit(c, 4), 10, 12, 1),  # a generated token
        Scheduled(_edit(d, 6, 2.0, (0, 2)), 11, 0, 6),  # columns 0 and 5
        Scheduled(_edit(a, 5), 17, 5, 1),  # decode: nothing
    ]
    step = build_step(scheduled, hosts, _bank(slots=5))
    hidden = torch.randn(18, WIDTH)
    for layer in range(LAYERS):
        expected = hidden.clone()
        expected[[0, 1, 3, 4]] = _expected(a, 0, layer, hidden[[0, 1, 3, 4]], 0.5)
        expected[[9]] = _expected(b, 0, layer, hidden[[9]])
        expected[[10]] = _expected(c, 0, layer, hidden[[10]])
        expected[[11]] = _expected(d, 0, layer, hidden[[11]], 2.0, (0, 2))
        expected[[16]] = _expected(d, 1, layer, hidden[[16]], 2.0, (0, 2))
        got = _apply(step, layer, hidden)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        untouched = [2, 5, 6, 7, 8, 12, 13, 14, 15, 17]
        assert torch.equal(got[untouched], hidden[untouched])


def test_layers_with_the_same_adapters_share_their_tensors():
    a, b = adapter("a", layers=(0, 2)), adapter("b", layers=(0, 1, 2))
    step = build_step(
        [Scheduled(_edit(x, 4), 4 * i, 0, 4) for i, x in enumerate((a, b))],
        {"a": a, "b": b},
        _bank(),
    )
    assert step.layers[0] is step.layers[2] and step.layers[0] is not step.layers[1]
    assert [len(groups) for groups in step.layers] == [1, 1, 1]  # one launch a layer
    assert step.layers[0][0].coeff is None


def test_a_step_without_edited_rows_is_none():
    a = adapter("a", positions="f2")
    assert build_step([Scheduled(_edit(a, 9), 0, 2, 7)], {"a": a}, _bank()) is None
    assert build_step([], {}, _bank()) is None


def test_an_adapter_without_the_layer_has_no_launch_there():
    a = adapter("a", layers=(1,))
    step = build_step([Scheduled(_edit(a, 4), 0, 0, 4)], {"a": a}, _bank())
    assert [len(groups) for groups in step.layers] == [0, 1, 0]


@pytest.mark.parametrize("spec", ("f3+l2", "l4", "f5", "prompt"))
def test_chunked_prefill_edits_each_row_once(spec):
    """The rows of all chunks of a prompt and its reply are those of the whole."""
    served = adapter("a", positions=spec)
    edit = _edit(served, 13)
    wanted = rk.positions.resolve(spec, [13], 13)
    for size in (1, 3, 4, 7, 16):
        columns = []
        for begin in range(0, 16, size):
            count = min(size, 16 - begin)
            step = build_step([Scheduled(edit, 100, begin, count)], {"a": served}, _bank())
            if step is not None:
                columns += [int(r) - 100 + begin for r in step.layers[0][0].rows]
        assert sorted(columns) == sorted(int(n) for n in wanted if n >= 0)


def test_the_end_of_an_edit():
    a = adapter("a")
    assert _edit(a, 9).end == 9 and not _edit(a, 9).edits_replies
    assert Edit("a", edited_ranges(parse("all"), False, 9)).edits_replies
    assert _edit(adapter("b", positions="f4"), 9).end == 4
