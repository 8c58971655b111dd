"""Accuracy of the public functions: error budget, gradcheck, and exact integer arithmetic."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import reft_kernels as rk
from reft_kernels.activations import ACTIVATIONS
from tests import budget, inputs, plain
from tests.inputs import Case

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("poison")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REPRESENTATIVE = [
    Case(activation="linear"),
    Case(activation="linear", rows=9, inplace=True),
    Case(activation="gelu", rows=9, sets=2, coeff=True),
    Case(activation="silu", sets=2, inplace=True),
]
EXHAUSTIVE = [
    Case((3, 40), d, r, rows, sets, coeff, inplace, activation)
    for d, r in ((33, 4), (130, 16), (768, 8))
    for rows, sets, coeff, inplace in itertools.product(
        (None, 40), (None, 2), (False, True), (False, True)
    )
    for activation in ACTIVATIONS
]

MANY_RANKS = [
    Case((37,), 51, 17),
    Case((37,), 51, 17, rows=25, sets=2, coeff=True, inplace=True),
    Case((37,), 51, 17, activation="gelu"),
]

PAIRED = list(
    zip(REPRESENTATIVE, [torch.float32, torch.bfloat16, torch.float16, torch.float32], strict=True)
)


def _draws(backend: str, device: str) -> int:
    return 3 if (backend, device) == ("triton", "cpu") else 8  # the interpreter is slow


# error budget of forward and every gradient


@pytest.mark.parametrize(("case", "dtype"), PAIRED, ids=str)
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_error_budget(name, case, dtype, backend, device):
    budget.check(
        lambda: inputs.draw(name, case, dtype, device), dtype, draws=_draws(backend, device)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_error_budget_in_each_dtype(name, case, dtype):
    with rk.backend("torch"):
        budget.check(lambda: inputs.draw(name, case._replace(lead=(3, 10), d=65), dtype), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_error_budget_of_each_activation(activation, backend, device):
    case = Case(activation=activation, rows=9)
    budget.check(
        lambda: inputs.draw("noreft", case, torch.float32, device),
        torch.float32,
        draws=_draws(backend, device),
    )


@pytest.mark.parametrize("case", MANY_RANKS, ids=str)
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_error_budget_of_many_ranks(name, case, backend, device):
    """Kernels may multiply in bf16 for larger ranks. Ranks, channels and rows have odd sizes."""
    # Triton's interpreter truncates to bf16 instead of rounding
    dtype = torch.float16 if (backend, device) == ("triton", "cpu") else torch.bfloat16
    budget.check(
        lambda: inputs.draw(name, case, dtype, device), dtype, draws=_draws(backend, device)
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EXHAUSTIVE, ids=lambda case: f"{case}-{case.d}-{case.r}")
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_error_budget_exhaustively(name, case, dtype, backend, device):
    if (backend, device) == ("triton", "cpu"):
        case = case._replace(lead=(3, 8), d=min(case.d, 48), rows=case.rows and 12)
    budget.check(
        lambda: inputs.draw(name, case, dtype, device), dtype, draws=_draws(backend, device)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [Case(), Case(inplace=True), Case(rows=9, sets=2), Case(rows=9, inplace=True)],
    ids=lambda case: str(case)[7:],
)
def test_error_budget_of_red(case, dtype, backend, device):
    def make():
        lead = () if case.sets is None else (case.sets,)
        fixed = inputs.options(case, device)
        del fixed["activation"]
        tensors = {
            "hidden": torch.randn(*case.lead, case.d, device=device).to(dtype),
            "scale": 1 + 0.1 * torch.randn(*lead, case.d, device=device),
            "bias": 0.1 * torch.randn(*lead, case.d, device=device),
        }

        def engine(hidden, scale, bias):
            return rk.red(
                hidden.clone() if case.inplace else hidden,
                scale,
                bias,
                inplace=case.inplace,
                **fixed,
            )

        return budget.Draw(tensors, engine, lambda **leaves: plain.red(**leaves, **fixed))

    budget.check(make, dtype, draws=_draws(backend, device))


@pytest.mark.parametrize("name", ["loreft", "noreft"])
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 3), (torch.float16, 1)], ids=str)
def test_error_budget_of_edits_larger_than_the_hidden_state(dtype, times, name, backend, device):
    """Accuracy of edits that are larger than the hidden state.

    Over all rows, the backward reconstructs the input from the output, which loses accuracy for
    large edits.
    """

    def make():
        draw = inputs.draw(name, Case((24,), 24, 3), dtype, device)
        read = "W" if name == "loreft" else "W1"
        exact = budget.cast(draw.inputs, torch.float64)
        edit = draw.plain(**exact) - exact["hidden"]
        draw.inputs[read] *= float(times * exact["hidden"].norm() / edit.norm())
        return draw

    budget.check(make, dtype, draws=_draws(backend, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights(dtype, backend, device):
    """Weights may have the hidden state's dtype. Their gradients have the same dtype."""

    def make():
        drawn = inputs.draw("loreft", Case(rows=9), dtype, device)
        return drawn._replace(inputs=budget.cast(drawn.inputs, dtype))

    budget.check(make, dtype, draws=_draws(backend, device))


# gradients in fp64


def _gradcheck(name: str, case: Case) -> None:
    drawn = inputs.draw(name, case, torch.float64)
    names = list(drawn.inputs)
    leaves = [drawn.inputs[k].requires_grad_() for k in names]
    assert torch.autograd.gradcheck(
        lambda *leaves: drawn.engine(**dict(zip(names, leaves, strict=True))), leaves
    )


_GRADCHECK = [
    Case((2, 2), 3, 2),
    Case((2, 3), 3, 2, rows=4, coeff=True),
    Case((2, 2), 5, 2, sets=2, inplace=True),
    Case((6,), 3, 1, rows=5, sets=3, coeff=True, inplace=True),
]
_GRADCHECK_FULL = [
    Case((2, 3), 3, 2, *choice)
    for choice in itertools.product((None, 4), (None, 2), (False, True), (False, True))
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", _GRADCHECK, ids=lambda case: str(case)[7:])
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_gradcheck(name, case, activation):
    _gradcheck(name, case._replace(activation=activation))


@pytest.mark.full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", _GRADCHECK_FULL, ids=lambda case: str(case)[7:])
@pytest.mark.parametrize("name", plain.MEMBERS)
def test_gradcheck_exhaustively(name, case, activation):
    _gradcheck(name, case._replace(activation=activation))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rows", [None, [4, -1, 0]])
@pytest.mark.parametrize("sets", [None, 2])
def test_gradcheck_of_red(rows, sets, inplace):
    rows = None if rows is None else torch.tensor(rows, dtype=torch.int32)
    weight_ids = (
        None if sets is None else torch.arange(6 if rows is None else 3, dtype=torch.int32) % sets
    )
    lead = () if sets is None else (sets,)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5), (*lead, 5), (*lead, 5))
    ]

    def edit(hidden, scale, bias):
        return rk.red(
            hidden.clone() if inplace else hidden,
            scale,
            bias,
            rows=rows,
            weight_ids=weight_ids,
            inplace=inplace,
        )

    assert torch.autograd.gradcheck(edit, leaves)


# exact arithmetic: sums of small integers are exact in any order, so results must be identical

LAYOUTS = {
    "contiguous": lambda lead, d: ((*lead, d), lambda t: t),
    "sliced rows": lambda lead, d: ((*lead[:-1], 2 * lead[-1], d), lambda t: t[..., ::2, :]),
    "sliced columns": lambda lead, d: ((*lead, 2 * d), lambda t: t[..., ::2]),
    "transposed": lambda lead, d: ((d, *lead), lambda t: t.movedim(0, -1)),
    "permuted": lambda lead, d: (
        (*reversed(lead), d),
        lambda t: t.permute(*reversed(range(t.dim() - 1)), t.dim() - 1),
    ),
    "expanded": lambda lead, d: (
        (*lead[:-1], 1, d),
        lambda t: t.expand(*t.shape[:-2], lead[-1], d),
    ),
}


@st.composite
def _exact_calls(draw, largest: int):
    name = draw(st.sampled_from(sorted(plain.MEMBERS)))
    lead = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    total = torch.Size(lead).numel()
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    inplace = layout != "expanded" and draw(st.booleans())
    rows = draw(
        st.none() | st.lists(st.integers(0, max(total - 1, 0)), max_size=total, unique=True)
    )
    if rows:
        rows = [-1 if draw(st.integers(0, 3)) == 0 else row for row in rows]
    case = Case(
        lead,
        draw(st.integers(1, largest)),
        draw(st.integers(1, 9)),
        None if rows is None else len(rows),
        draw(st.none() | st.integers(1, 3)),
        draw(st.booleans()),
        inplace,
        draw(st.sampled_from(["linear", "relu"])),
    )
    # over all rows, a half-precision backward reconstructs the input from a rounded output
    dtype = draw(st.sampled_from(DTYPES if rows is not None else [torch.float32]))
    return name, case, layout, rows, dtype, draw(st.integers(0, 2**16))


def _check_exact(call, device: str) -> None:
    name, case, layout, rows, dtype, seed = call
    generator = torch.Generator().manual_seed(seed)
    member = plain.MEMBERS[name]
    total = torch.Size(case.lead).numel()
    count = total if rows is None else len(rows)
    lead = () if case.sets is None else (case.sets,)

    def whole(*shape, low=-1, high=2):
        return torch.randint(low, high, shape, generator=generator).double().to(device)

    shape, view = LAYOUTS[layout](case.lead, case.d)
    leaves = {"hidden": whole(*shape)}
    leaves |= {k: whole(*lead, case.r, case.d) for k in member.matrices}
    leaves |= {k: whole(*lead, case.r) for k in member.vectors}
    if case.coeff:
        leaves["coeff"] = whole(count, case.r, low=0, high=3)
    fixed = {
        "rows": None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device),
        "weight_ids": None
        if case.sets is None
        else torch.randint(case.sets, (count,), dtype=torch.int32, generator=generator).to(device),
        "activation": case.activation,
    }

    def engine(hidden, coeff=None, **weights):
        hidden = view(hidden.clone() if case.inplace else hidden)
        return member.function(hidden, coeff=coeff, inplace=case.inplace, **weights, **fixed)

    def formula(hidden, coeff=None, **weights):
        return plain.edit(name, view(hidden), weights, coeff=coeff, **fixed)

    grad_output = whole(*case.lead, case.d).to(dtype)
    want = budget.outputs(formula, leaves, grad_output)
    ours = {k: t.to(dtype if k == "hidden" else torch.float32) for k, t in leaves.items()}
    for key, got in budget.outputs(engine, ours, grad_output).items():
        assert torch.equal(got, want[key].to(got.dtype)), key


@hypothesis.settings(max_examples=200)
@hypothesis.given(call=_exact_calls(40))
def test_exact_over_shapes_strides_and_dtypes(call):
    with rk.backend("torch"):
        _check_exact(call, "cpu")


@hypothesis.settings(max_examples=25)
@hypothesis.given(call=_exact_calls(19))
def test_exact_on_each_backend(call, backend, device):
    _check_exact(call, device)


# special cases


@pytest.mark.parametrize("name", plain.MEMBERS)
def test_rank_256(name, device, backend):
    case = Case((4,), 256, 256, rows=2)
    budget.check(lambda: inputs.draw(name, case, torch.float32, device), torch.float32, draws=1)


def test_float16_range(backend, device):
    """Sums that exceed fp16's range are accumulated in fp32."""
    d = 16
    hidden = torch.full((2, d), 6e4, dtype=torch.float16, device=device)
    R = torch.eye(1, d, device=device)
    W = torch.ones(1, d, device=device)
    b = torch.tensor([-6e4 * d], device=device)
    # z = 16 * 60000 - 16 * 60000 = 0: column 0 becomes 0, and the others stay
    out = rk.loreft(hidden, R, W, b)
    assert torch.equal(out[:, 1:], hidden[:, 1:])
    assert out.isfinite().all() and (out[:, 0].abs() <= 6e4 * 2**-10).all()


def test_autocast_changes_nothing(backend, device):
    drawn = inputs.draw("loreft", Case(rows=9, activation="gelu"), torch.bfloat16, device)
    grad = torch.randn(*drawn.inputs["hidden"].shape, device=device, dtype=torch.bfloat16)

    def under_autocast(**leaves):
        with torch.autocast(device, dtype=torch.bfloat16):
            return drawn.engine(**leaves)

    plain_run = budget.outputs(drawn.engine, drawn.inputs, grad)
    for key, got in budget.outputs(under_autocast, drawn.inputs, grad).items():
        assert torch.equal(got, plain_run[key]), key
