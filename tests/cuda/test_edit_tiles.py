"""The edit of many rows by clusters (edit_tiles.cu), against the fp64 reference.

It serves half precision and one set of weights, all rows or selected ones. The tests run
on a GPU or in the emulation, as those of test_cuda_kernels.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import reft_kernels as rk
from reft_kernels.activations import ACTIVATIONS
from tests import budget, inputs, plain
from tests.cuda.support import (
    DEVICE,
    EMULATED,
    MARKS,
    emulation_alone,
    gpu_alone,
    in_each_order,
    kernels,
)
from tests.inputs import Case

pytestmark = [
    *MARKS,
    pytest.mark.skipif(
        EMULATED and torch.ops.reft_kernels_cuda.emulated() < 900,
        reason="needs clusters, from compute capability 9.0",
    ),
]

HALF = (torch.bfloat16, torch.float16)
# the emulated GPU has 16 multiprocessors: 16 clusters of one block, 4 of four
CASES = {
    "one block": Case((37,), 256, 8, coeff=True),
    "columns past the end": Case((5, 7), 264, 3, inplace=True),
    "one warp": Case((9,), 8, 1),
    "several tiles a cluster": Case((3, 301), 128, 8, coeff=True, inplace=True),
    "two blocks": Case((150,), 1048, 6, inplace=True),
    "four blocks": Case((150,), 4096, 8),
    "eight blocks": Case((70,), 4104, 2, coeff=True),
    "rank 9 to 16": Case((3, 100), 264, 13, coeff=True),
    "rank 16, four blocks": Case((100,), 2056, 16, inplace=True),
    "selected rows": Case((4, 100), 136, 8, rows=301, coeff=True, inplace=True),
    "selected rows, two blocks": Case((4, 100), 1032, 12, rows=270),
}


def _launches(drawn: budget.Draw) -> int:
    return kernels(lambda: drawn.engine(**drawn.inputs))


def _edits() -> list:
    found = []
    for name, case, dtype, activation in itertools.product(
        plain.MEMBERS, CASES, HALF, ("linear", "gelu")
    ):
        # one of two for each case, in turn
        kept = (name, activation, dtype) == (
            ("loreft", "linear", torch.bfloat16),
            ("noreft", "gelu", torch.float16),
        )[list(CASES).index(case) % 2]
        marks = () if kept else pytest.mark.emulation_full
        found.append(
            pytest.param(
                name, case, dtype, activation, id=f"{name}-{case}-{dtype}-{activation}", marks=marks
            )
        )
    return found


@pytest.mark.parametrize(("name", "case", "dtype", "activation"), _edits())
def test_error_budget(name, case, dtype, activation):
    case = CASES[case]._replace(activation=activation)
    budget.check(lambda: inputs.draw(name, case, dtype, DEVICE), dtype, draws=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation(activation):
    case = Case((40,), 64, 6, coeff=True, activation=activation)
    budget.check(lambda: inputs.draw("noreft", case, torch.bfloat16, DEVICE), torch.bfloat16)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("changed", [("R", "W", "b", "coeff"), ("W", "b")], ids=str)
def test_dtypes_of_weights(changed, weights):
    def make():
        drawn = inputs.draw("loreft", Case((2, 12), 48, 6, coeff=True), torch.bfloat16, DEVICE)
        given = {k: t.to(weights) if k in changed else t for k, t in drawn.inputs.items()}
        return drawn._replace(inputs=given)

    budget.check(make, torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-3, 300.0])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_and_small_values(dtype, scale):
    """u of fp16 hidden states may pass fp16's range, because its terms are bf16."""

    def make():
        drawn = inputs.draw("direft", Case((40,), 512, 4), dtype, DEVICE)
        given = drawn.inputs | {"hidden": drawn.inputs["hidden"] * scale}
        return drawn._replace(inputs=given)

    budget.check(make, dtype, backward=False)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 257])
def test_every_number_of_rows(rows):
    case = Case((rows,), 136, 5, inplace=True)
    budget.check(
        lambda: inputs.draw("loreft", case, torch.bfloat16, DEVICE), torch.bfloat16, draws=4
    )


@pytest.mark.parametrize("case", CASES)
def test_one_launch_serves_these_cases(case):
    assert _launches(inputs.draw("loreft", CASES[case], torch.bfloat16, DEVICE)) == 1


_OTHERS = {  # name, case, dtype
    "fp32": ("loreft", Case((40,), 64, 4), torch.float32),
    "odd d": ("loreft", Case((40,), 63, 4), torch.bfloat16),
    "rank 17": ("loreft", Case((40,), 64, 17), torch.bfloat16),
    "two products at rank 9": ("noreft", Case((40,), 64, 9, activation="gelu"), torch.bfloat16),
    "sets": ("loreft", Case((40,), 64, 4, sets=2), torch.bfloat16),
    "d over 8192": ("loreft", Case((20,), 8200, 2), torch.bfloat16),
}


@pytest.mark.parametrize("case", _OTHERS)
def test_other_calls_go_elsewhere(case):
    name, shape, dtype = _OTHERS[case]
    assert _launches(inputs.draw(name, shape, dtype, DEVICE)) == 0
    budget.check(lambda: inputs.draw(name, shape, dtype, DEVICE), dtype, draws=2)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", ["aligned", "unaligned", "offset"])
def test_strides(layout, dtype):
    """A hidden state that is a slice of a wider one is edited in place."""
    d, total = 136, 50
    wide = torch.randn(total, 2 * d, device=DEVICE).to(dtype)
    part = {
        "aligned": lambda t: t[:, 8 : d + 8],
        "unaligned": lambda t: t.flatten()[: total * (d + 3)].view(total, d + 3)[:, :d],
        "offset": lambda t: t[:, 1 : d + 1],
    }[layout]
    weights = inputs.weights("loreft", Case(d=d, r=5), device=DEVICE)
    want = rk.loreft(part(wide).contiguous(), *weights.values())
    edited = wide.clone()
    launched = kernels(lambda: rk.loreft(part(edited.clone()), *weights.values(), inplace=True))
    assert launched == (1 if layout == "aligned" else 0)
    results = rk.loreft(part(edited), *weights.values(), inplace=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results, want, rtol=2 * eps, atol=2 * eps)
    untouched = torch.ones_like(wide, dtype=torch.bool)
    part(untouched).fill_(False)
    assert torch.equal(edited[untouched], wide[untouched])


@pytest.mark.parametrize("inplace", [False, True])
def test_unselected_rows_are_bit_identical(inplace):
    """Unselected rows may hold NaN, which does not reach other rows."""
    rows = inputs.rows(400, 301, device=DEVICE)
    outside = torch.ones(400, dtype=torch.bool, device=DEVICE)
    outside[rows[rows >= 0].long()] = False
    hidden = torch.randn(400, 72, device=DEVICE).to(torch.bfloat16)
    hidden[outside] = float("nan")
    weights = inputs.weights("loreft", Case(d=72, r=3), device=DEVICE)
    out = rk.loreft(hidden.clone(), **weights, rows=rows, inplace=inplace)
    assert torch.equal(out[outside].view(torch.int16), hidden[outside].view(torch.int16))
    assert out[~outside].isfinite().all()


def test_a_row_of_NaN_stays_alone():
    hidden = torch.randn(40, 264, device=DEVICE).to(torch.float16)
    hidden[[3, 17]] = float("nan")
    weights = inputs.weights("loreft", Case(d=264, r=3), device=DEVICE)
    out = rk.loreft(hidden, **weights)
    assert out[[3, 17]].isnan().all()
    assert out.isfinite().all(1).sum() == 38


@pytest.mark.parametrize("case", ["several tiles a cluster", "eight blocks", "selected rows"])
def test_two_runs_and_both_destinations_are_bit_identical(case):
    results = []
    for inplace in (False, True, True):
        torch.manual_seed(1)
        case_of_run = CASES[case]._replace(inplace=inplace)
        drawn = inputs.draw("loreft", case_of_run, torch.bfloat16, DEVICE)
        results.append(budget.outputs(drawn.engine, drawn.inputs)["output"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@emulation_alone
@pytest.mark.parametrize(
    "case", ["several tiles a cluster", "two blocks", "eight blocks", "selected rows"]
)
def test_the_order_of_threads_changes_no_bit(case):
    drawn = inputs.draw("loreft", CASES[case], torch.bfloat16, DEVICE)
    first, *others = in_each_order(lambda: drawn.engine(**drawn.inputs))
    assert all(torch.equal(first, other) for other in others)


@gpu_alone
def test_captured_in_a_graph():
    hidden = torch.randn(100, 4096, device=DEVICE).to(torch.bfloat16)
    weights = inputs.weights("loreft", Case(d=4096, r=8), device=DEVICE)
    want = rk.loreft(hidden, **weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rk.loreft(hidden, **weights)
    graph.replay()
    assert torch.equal(out, want)
