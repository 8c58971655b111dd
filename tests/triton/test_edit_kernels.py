"""Triton kernels of the edit and of RED in every launch regime, against the fp64 reference.

For small shapes, the public functions reach only one regime, so each regime is forced here. The
budget is that of :mod:`tests.budget`. The straightforward computation is the reference with every
intermediate rounded to the hidden state's dtype.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import random

import pytest
import torch

from reft_kernels import reference
from reft_kernels.dispatch import interpreting

pytest.importorskip("triton", reason="needs the package triton")
if not (interpreting() or torch.cuda.is_available()):
    pytest.skip(
        "needs a GPU, or the Triton interpreter (TRITON_INTERPRET=1)", allow_module_level=True
    )

all_rows = importlib.import_module("reft_kernels.triton.edit_all_rows")
forward = importlib.import_module("reft_kernels.triton.edit")
backward = importlib.import_module("reft_kernels.triton.edit_backward")
delta = importlib.import_module("reft_kernels.triton.edit_delta")
gradient = importlib.import_module("reft_kernels.triton.edit_gradient")
red = importlib.import_module("reft_kernels.triton.red")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16, which doubles the error, so bf16 needs a GPU
DTYPES = (
    (torch.float32, torch.float16)
    if interpreting()
    else (torch.float32, torch.float16, torch.bfloat16)
)
CASES = list(
    itertools.product(
        DTYPES,
        ("selected", "all"),  # rows
        (None, 3),  # sets
        ("linear", "gelu", "sigmoid"),
        (
            (True, True),
            (True, False),
            (False, True),
            (False, False),
        ),  # has a read matrix, subtracts
        (False, True),  # coeff
        (7, 70),  # rows edited
        (1, 5, 20),  # rank
        ("few", "many"),  # configuration
    )
)
SAMPLE = random.Random(0).sample(CASES, 48)
DRAWS = 8  # one draw may be rounded well by chance if outputs have few elements


def _id(case) -> str:
    dtype, rows, sets, activation, (reads, subtracts), coeff, n, r, regime = case
    flags = "".join(
        ("A" if reads else "", "P" if subtracts else "", "k" if coeff else "", "S" if sets else "")
    )
    return f"{str(dtype)[6:]}-{rows}-{activation}-{flags or 'none'}-n{n}-r{r}-{regime}"


def _double(tensor):
    return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor


def _run(module_edit, module_backward, inputs, convert):
    """Run forward and backward in place on converted copies and return every output."""
    (
        hidden,
        grad,
        rows,
        weight_ids,
        read,
        bias,
        write,
        subtract_bias,
        coeff,
        subtract_projection,
        activation,
    ) = inputs
    hidden, grad = convert(hidden).clone(), convert(grad).clone()
    read, bias, write, subtract_bias, coeff = (
        convert(t) for t in (read, bias, write, subtract_bias, coeff)
    )
    saved_input, u, z = module_edit(
        hidden,
        hidden,
        rows,
        weight_ids,
        read,
        bias,
        write,
        subtract_bias,
        coeff,
        subtract_projection,
        activation,
        True,
    )
    saved_input = hidden if rows is None else saved_input
    grads = module_backward(
        grad,
        grad,
        saved_input,
        u,
        z,
        rows,
        weight_ids,
        read,
        write,
        coeff,
        subtract_projection,
        activation,
        True,
    )
    names = ("y", "u", "z", "dh", "dA", "dc", "dB", "dp", "dcoeff")
    return dict(zip(names, (hidden, u, z, grad, *grads), strict=True))


def _hold(draws):
    """Check (ours, straightforward, exact) of several draws against the error budget."""
    for name in draws[0][0]:
        results = []
        for ours, theirs, exact in draws:
            got, want = ours[name], exact[name]
            assert got.shape == want.shape, (
                f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            )
            if want.numel():
                numbers = (
                    (got.double() - want).abs().max(),
                    (theirs[name].double() - want).abs().max(),
                    want.abs().max(),
                )
                results.append([float(n) for n in numbers])
        if not results:
            continue
        error, straightforward, size = (max(column) for column in zip(*results, strict=True))
        allowed = 2 * straightforward + torch.finfo(got.dtype).eps * size
        assert error <= allowed, (
            f"{name}: {error:.2e} over the budget {allowed:.2e} (straightforward "
            f"{straightforward:.2e})"
        )


def _inputs(dtype, rows_kind, sets, activation, reads, subtracts, with_coeff, n, r):
    total, d = (n, 37) if rows_kind == "all" else (90, 37)
    lead = () if sets is None else (sets,)

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE)

    rows = None
    if rows_kind == "selected":
        rows = torch.randperm(total)[:n].to(torch.int32)
        rows[[0, 2]] = -1
        rows = rows.to(DEVICE)
    weight_ids = (
        None if sets is None else torch.randint(0, sets, (n,), dtype=torch.int32).to(DEVICE)
    )
    return (
        normal(total, d).to(dtype),
        normal(total, d).to(dtype),
        rows,
        weight_ids,
        normal(*lead, r, d) / 6 if reads else None,
        normal(*lead, r),
        normal(*lead, r, d) / 6,
        normal(*lead, r) if subtracts else None,
        torch.rand(n, r, device=DEVICE) if with_coeff else None,
        subtracts,
        activation,
    )


def _force(monkeypatch, regime):
    for module, name in (
        (forward, "edit_config"),
        (delta, "delta_config"),
        (gradient, "gradient_config"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda n, *rest, original=original: original(10 if regime == "few" else 5000, *rest),
        )


@pytest.mark.parametrize("case", SAMPLE, ids=_id)
def test_edit_and_its_backward(case, monkeypatch, poison):
    dtype, rows, sets, activation, (reads, subtracts), coeff, n, r, regime = case
    _force(monkeypatch, regime)
    draws = []
    for _ in range(DRAWS if n * r < 100 else 1):
        inputs = _inputs(dtype, rows, sets, activation, reads, subtracts, coeff, n, r)
        ours = _run(forward.edit, backward.edit_backward, inputs, lambda t: t)
        exact = _run(reference.edit, reference.edit_backward, inputs, _double)
        # the straightforward computation rounds to the hidden state's dtype at every step
        naive = _run(_naive(dtype)[0], _naive(dtype)[1], inputs, lambda t: t)
        draws.append((ours, naive, exact))
    _hold(draws)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "d, r, activation, reads, strided",
    [
        (1, 1, "linear", True, False),
        (33, 8, "gelu", True, True),
        (768, 4, "linear", True, False),
        (700, 3, "relu", False, False),
        (1024, 8, "linear", True, True),
    ],
)
def test_rows_read_once_into_registers(
    dtype, d, r, activation, reads, strided, monkeypatch, poison
):
    """All rows at few columns: the kernel that keeps a tile of rows on chip."""
    monkeypatch.setattr(forward, "FEW_ROWS", 0)
    launches = []
    launch = all_rows.launch_all_rows
    monkeypatch.setattr(all_rows, "launch_all_rows", lambda *a: (launches.append(a[0]), launch(*a)))
    n, draws = 37, []
    for _ in range(1 if d > 100 else DRAWS):
        read, write = (torch.randn(r, d, device=DEVICE) / d**0.5 for _ in range(2))
        hidden = torch.randn(n, 2 * d if strided else d, device=DEVICE).to(dtype)
        hidden = hidden[:, ::2] if strided else hidden
        bias, coeff = (torch.randn(*shape, device=DEVICE) for shape in ((r,), (n, r)))

        def run(edit, convert, hidden=hidden, read=read, write=write, bias=bias, coeff=coeff):
            x = convert(hidden)
            y = torch.full_like(x, float("nan"))
            weights = (convert(read) if reads else None, convert(bias), convert(write))
            _, u, z = edit(
                x, y, None, None, *weights, None, convert(coeff), False, activation, True
            )
            return {"y": y, "u": u, "z": z}

        naive = run(_naive(dtype)[0], lambda t: t.to(dtype))
        draws.append((run(forward.edit, lambda t: t), naive, run(reference.edit, _double)))
    assert len(launches) == len(draws)
    _hold(draws)


def test_rows_of_8_kib_with_bf16_weights(monkeypatch, poison):
    """The longest rows that stay on chip; the interpreter truncates y, an error below one ulp."""
    monkeypatch.setattr(forward, "FEW_ROWS", 0)
    configs = []
    launch = all_rows.launch_all_rows
    monkeypatch.setattr(all_rows, "launch_all_rows", lambda *a: (configs.append(a[0]), launch(*a)))
    d, r, n = 4096, 8, 19
    read, write = (torch.randn(r, d, device=DEVICE).bfloat16() / d**0.5 for _ in range(2))
    x = torch.randn(n, d, device=DEVICE).bfloat16()
    bias, y = torch.randn(r, device=DEVICE), torch.full_like(x, float("nan"))
    rest = (None, None, False, "linear", True)
    _, u, _ = forward.edit(x, y, None, None, read, bias, write, *rest)
    assert [(c.block_n, c.block_d, c.tiles) for c in configs] == [(16, 1024, 4)]
    want = torch.empty_like(x, dtype=torch.float64)
    doubles = map(_double, (read, bias, write))
    _, exact_u, _ = reference.edit(x.double(), want, None, None, *doubles, *rest)
    assert ((u - exact_u).abs() <= 2.0**-16 * exact_u.abs().max()).all()
    ulp = torch.finfo(torch.bfloat16).eps * want.abs()
    assert ((y.double() - want).abs() <= ulp + 2.0**-16 * want.abs().max()).all()


def _naive(dtype):
    """Return the reference with every input and result rounded to ``dtype``."""

    def rounded(function):
        def round_(t):
            return (
                t.to(dtype).to(t.dtype)
                if isinstance(t, torch.Tensor) and t.dtype == torch.float32
                else t
            )

        def call(source, out, *rest):
            return tuple(round_(t) for t in function(source, out, *(round_(a) for a in rest)))

        return call

    return rounded(reference.edit), rounded(reference.edit_backward)


@pytest.mark.parametrize("activation, rank", [("gelu", 5), ("linear", 40)])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_change_nothing_but_rounding_and_repeat_bit_for_bit(
    chunks, activation, rank, monkeypatch, poison
):
    """The gradients of 40 ranks are computed in two parts."""
    original = gradient.gradient_config
    monkeypatch.setattr(
        gradient,
        "gradient_config",
        lambda *a: dataclasses.replace(original(*a), chunks=chunks, block_n=16),
    )
    draws = []
    for _ in range(DRAWS):
        inputs = _inputs(torch.float32, "selected", 3, activation, True, True, True, 85, rank)
        first = _run(forward.edit, backward.edit_backward, inputs, lambda t: t)
        again = _run(forward.edit, backward.edit_backward, inputs, lambda t: t)
        assert all(torch.equal(first[name], again[name]) for name in first)
        exact = _run(reference.edit, reference.edit_backward, inputs, _double)
        naive = _run(reference.edit, reference.edit_backward, inputs, lambda t: t)
        draws.append((first, naive, exact))
    _hold(draws)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sets", [None, 2])
@pytest.mark.parametrize("selected", [True, False])
def test_red_and_its_backward(selected, sets, dtype, chunks, monkeypatch, poison):
    original = red.red_config
    monkeypatch.setattr(
        red, "red_config", lambda *a: dataclasses.replace(original(*a), chunks=chunks, block_n=4)
    )
    n, total, d = 25, 40 if selected else 25, 37
    lead = () if sets is None else (sets,)
    rows = None
    if selected:
        rows = torch.randperm(total)[:n].to(torch.int32)
        rows[3] = -1
        rows = rows.to(DEVICE)
    weight_ids = (
        None if sets is None else torch.randint(0, sets, (n,), dtype=torch.int32).to(DEVICE)
    )
    hidden, grad = (torch.randn(total, d, device=DEVICE).to(dtype) for _ in range(2))
    scale, bias = (torch.randn(*lead, d, device=DEVICE) for _ in range(2))

    def run(module, convert):
        h, g = convert(hidden).clone(), convert(grad).clone()
        s, b = convert(scale), convert(bias)
        saved_input = module.red(h, h, rows, weight_ids, s, b, True)
        sums = module.red_backward(g, g, saved_input, rows, weight_ids, s, True)
        return dict(zip(("y", "dh", "dscale", "dbias"), (h, g, *sums), strict=True))

    _hold([(run(red, lambda t: t), run(reference, lambda t: t), run(reference, _double))])
