"""Results of the native backend are bit-identical for any number of threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import reft_kernels as rk
from tests import budget, inputs
from tests.inputs import Case


def _assert_the_same_on_any_number_of_threads(once: Callable[[], dict[str, torch.Tensor]]) -> None:
    before, results = torch.get_num_threads(), []
    try:
        with rk.backend("cpu"):
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(once())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 9), (torch.bfloat16, 5), (torch.bfloat16, 17)]
)
@pytest.mark.parametrize("rows", [None, 700])
@pytest.mark.parametrize("sets", [None, 3])
@pytest.mark.parametrize("name", ["loreft", "noreft"])
def test_edit(name, sets, rows, dtype, rank):
    case = Case(
        (1500,),
        515,
        rank,
        rows=rows,
        sets=sets,
        coeff=True,
        activation="linear" if name == "loreft" else "silu",
    )
    draw = inputs.draw(name, case, dtype)
    grad = torch.randn(*case.lead, case.d).to(dtype)
    _assert_the_same_on_any_number_of_threads(
        lambda: budget.outputs(draw.engine, draw.inputs, grad)
    )


@pytest.mark.parametrize("rows", [None, 700])
def test_red(rows):
    chosen = None if rows is None else inputs.rows(1500, rows)
    leaves = {"hidden": torch.randn(1500, 515), "scale": torch.randn(515), "bias": torch.randn(515)}
    grad = torch.randn(1500, 515)
    _assert_the_same_on_any_number_of_threads(
        lambda: budget.outputs(
            lambda hidden, scale, bias: rk.red(hidden, scale, bias, rows=chosen), leaves, grad
        )
    )


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("rank", [8, 40])
@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("name", ["householder", "cayley"])
def test_orthonormal(name, based, rank, layers):
    base = rk.base_point(rk.orthonormalize(torch.randn(layers, rank, 2311))) if based else None
    leaves = {"X": torch.randn(layers, 2311, rank) / 2311**0.5}
    grad = torch.randn(layers, rank, 2311)
    _assert_the_same_on_any_number_of_threads(
        lambda: budget.outputs(lambda X: getattr(rk, name)(X, base), leaves, grad)
    )
