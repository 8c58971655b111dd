"""Edits of few rows at large ranks: programs read a part of the weights, in two launches.

Variants are held to the error budget against the fp64 reference, and two calls are bit-identical.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random

import pytest
import torch

from reft_kernels import reference
from tests.triton import test_edit_kernels as kernels

split = importlib.import_module("reft_kernels.triton.edit_split")
edit = kernels.forward.edit
edit_backward = kernels.backward.edit_backward

ACTIVATIONS = ("linear", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid")
CASES = list(
    itertools.product(
        kernels.DTYPES,
        ("selected", "all"),  # rows
        (None, 2),  # sets
        ACTIVATIONS,
        ((True, True), (True, False), (False, True)),  # has a read matrix, subtracts
        (False, True),  # coeff
        (9, 35),  # rows edited
        (17, 33, 64),  # rank
    )
)
SAMPLE = random.Random(3).sample(CASES, 8)


def _id(case) -> str:
    return kernels._id((*case, "split"))


@pytest.fixture
def launched(monkeypatch):
    """Split every shape into parts of one step; yields the names of the kernels as launched."""
    original = split.split_config

    def forced(num_rows, d, *rest):
        config = original(num_rows, d, *rest)
        parts = -(-d // config.block_d)
        # 32 rows as for bf16, which the interpreter rounds otherwise
        return dataclasses.replace(config, block_n=32, width=config.block_d, parts=parts)

    monkeypatch.setattr(split, "WEIGHT_BYTES", 0)
    monkeypatch.setattr(split, "split_config", forced)
    original.cache_clear()
    names = []
    launch = split.launch.launch
    monkeypatch.setattr(
        split.launch,
        "launch",
        lambda bound, *rest: (names.append(bound.kernel.__name__), launch(bound, *rest)),
    )
    yield names
    original.cache_clear()


def _wide(inputs, d):
    """Return inputs of tests.triton.test_edit_kernels with d columns, over several parts."""
    hidden, grad, rows, ids, read, bias, write, *rest = inputs

    def grown(t):
        return None if t is None else torch.randn(*t.shape[:-1], d, device=t.device).to(t.dtype)

    scale = (37 / d) ** 0.5 / 6
    read, write = (None if t is None else grown(t) * scale for t in (read, write))
    return (grown(hidden), grown(grad), rows, ids, read, bias, write, *rest)


@pytest.mark.parametrize("case", SAMPLE, ids=_id)
def test_edit_and_its_backward(case, launched, poison):
    dtype, rows, sets, activation, (reads, subtracts), coeff, n, r = case
    inputs = kernels._inputs(dtype, rows, sets, activation, reads, subtracts, coeff, n, r)
    inputs = _wide(inputs, random.Random(str(case)).choice((129, 144)))
    ours = kernels._run(edit, edit_backward, inputs, lambda t: t)
    assert launched[:4] == ["project_kernel", "write_kernel", "project_kernel", "factors_kernel"]
    exact = kernels._run(reference.edit, reference.edit_backward, inputs, kernels._double)
    naive = kernels._run(*kernels._naive(dtype), inputs, lambda t: t)
    kernels._hold([(ours, naive, exact)])


def test_two_calls_are_bit_identical(launched):
    inputs = kernels._inputs(torch.float16, "selected", None, "gelu", True, True, True, 7, 20)
    first = kernels._run(edit, edit_backward, inputs, lambda t: t)
    again = kernels._run(edit, edit_backward, inputs, lambda t: t)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("save, sets", [(True, 2), (False, None)])
def test_out_of_place_with_strides(save, sets, launched, poison):
    """Rows that are not selected keep their values; nothing is saved without ``save``."""
    dtype, n, total, d, r = torch.float16, 35, 50, 200, 20
    lead = () if sets is None else (sets,)
    source = torch.randn(total, 2 * d, device=kernels.DEVICE).to(dtype)[:, ::2]
    kept = source.clone()
    rows = torch.randperm(total)[:n].int()
    rows[[1, 33]] = -1
    rows = rows.to(kernels.DEVICE)
    ids = None if sets is None else (torch.arange(n) % 2).int().to(kernels.DEVICE)
    read, write = (torch.randn(*lead, r, d, device=kernels.DEVICE) / d**0.5 for _ in range(2))
    rest = (torch.randn(*lead, r, device=kernels.DEVICE), write, None, None, True, "linear", save)

    def run(function, convert):
        out = torch.full((d, total), 7.0, device=kernels.DEVICE).to(convert(source).dtype).t()
        arguments = [convert(t) if isinstance(t, torch.Tensor) else t for t in rest]
        saved = function(convert(source), out, rows, ids, convert(read), *arguments)
        return dict(zip(("y", "saved_input", "u", "z"), (out, *saved), strict=True))

    ours = run(edit, lambda t: t)
    assert launched == ["project_kernel", "write_kernel"]
    others = torch.ones(total, dtype=torch.bool)
    others[rows[rows >= 0].long().cpu()] = False
    assert (ours["y"][others] == 7).all() and torch.equal(source, kept)
    exact = run(reference.edit, kernels._double)
    naive = run(kernels._naive(dtype)[0], lambda t: t)
    if save:
        wanted = torch.where(rows[:, None] >= 0, exact["saved_input"], 0)
        assert torch.equal(ours["saved_input"].double(), wanted)
        ours["saved_input"] = exact["saved_input"] = naive["saved_input"] = wanted
    kernels._hold([(ours, naive, exact)])


def test_no_rows_launch_nothing(launched):
    inputs = kernels._inputs(torch.float32, "selected", None, "gelu", True, True, True, 5, 20)
    hidden, grad, rows, ids, *weights, coeff, subtract, activation = inputs
    inputs = (hidden, grad, rows[:0], ids, *weights, coeff[:0], subtract, activation)
    results = kernels._run(edit, edit_backward, inputs, lambda t: t)
    assert not launched and torch.equal(results["y"], hidden)
    assert not any(results[name].any() for name in ("dA", "dc", "dB", "dp"))


def test_an_edit_without_a_projection_takes_one_launch(launched):
    inputs = kernels._inputs(torch.float32, "selected", None, "linear", False, False, False, 7, 20)
    kernels._run(edit, edit_backward, inputs, lambda t: t)
    assert launched[0] == "edit_kernel"
