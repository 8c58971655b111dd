"""Edits of attention heads against their formulas, and before an output projection."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from reft_kernels.related_methods import JoLA, LoFiT
from tests import budget
from tests.related_methods import common

pytestmark = pytest.mark.usefixtures("poison")
B, T, H, D = 2, 3, 4, 7
HEADS = (0, 3)
SELECTED = (5, -1, 0, 2)
CASES = [(None, None, False), (None, SELECTED, True), (HEADS, None, True), (HEADS, SELECTED, False)]


def _by_head(z, heads, rows, edit):
    """Apply ``edit(k, z_i)`` to each edited head i, the k-th in order, of each selected token."""
    out = z.reshape(-1, H, D).clone()
    for token in range(B * T) if rows is None else [r for r in rows if r >= 0]:
        for k, head in enumerate(range(H) if heads is None else heads):
            out[token, head] = edit(k, out[token, head].clone())
    return out.view_as(z)


def _check(make_module, formula, dtype, case, backend, device):
    heads, rows, inplace = case

    def make():
        module = common.randomized(make_module(heads))
        z = torch.randn(B, T, H * D, device=device).to(dtype)
        fixed = {"rows": None if rows is None else common.rows(device, *rows)}
        return (
            module,
            {"z": z},
            fixed,
            lambda z, **weights: _by_head(z, heads, rows, lambda k, x: formula(k, x, **weights)),
        )

    common.check(make, dtype, inplace=inplace, draws=common.draws(backend, device))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_lofit_offsets(dtype, case, backend, device):
    _check(
        lambda heads: LoFiT(H, D, heads, device=device),
        lambda k, x, v: x + v[k],
        dtype,
        case,
        backend,
        device,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lofit_scales(case, backend, device):
    def module(heads):
        return LoFiT(H, D, heads, stage="select", device=device)

    _check(module, lambda k, x, a: (1 + a[k]) * x, torch.float32, case, backend, device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", common.DTYPES, ids=str)
def test_jola_in_evaluation(dtype, case, backend, device):
    def gate(alpha):
        return (torch.sigmoid(alpha) * 1.2 - 0.1).clamp(0, 1)

    def formula(k, x, a, v, alpha_a, alpha_v):
        return (1 + gate(alpha_a[k]) * a[k]) * x + gate(alpha_v[k]) * v[k]

    _check(
        lambda heads: JoLA(H, D, heads, device=device).eval(), formula, dtype, case, backend, device
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jola_in_training_draws_hard_concrete_gates(case, backend, device):
    seeds = {}

    def module(heads):
        made = JoLA(H, D, heads, device=device)
        seeds["now"] = int(torch.randint(2**31, ()))
        made.register_forward_pre_hook(lambda *_: torch.manual_seed(seeds["now"]) and None)
        return made

    def formula(k, x, a, v, alpha_a, alpha_v):
        generator = torch.Generator(device).manual_seed(seeds["now"])
        u = [torch.rand(len(alpha_a), generator=generator, device=device) for _ in range(2)]

        def gate(alpha, u):
            s = torch.sigmoid((torch.log(u.to(x)) - torch.log(1 - u.to(x)) + alpha) / 0.33)
            return (s * 1.2 - 0.1).clamp(0, 1)[k]

        return (1 + gate(alpha_a, u[0]) * a[k]) * x + gate(alpha_v, u[1]) * v[k]

    _check(module, formula, torch.float32, case, backend, device)


def test_expected_open_is_the_share_of_open_gates():
    module = JoLA(50_000, 1)
    with torch.no_grad():
        module.alpha_a.fill_(-1.0)
        module.alpha_v.fill_(-1.0)
        opened = float((module.gate(module.alpha_a) > 0).double().mean())
        expected = float(module.expected_open()) / 100_000
    p = 1 / (1 + math.exp(1.0 + 0.33 * math.log(0.1 / 1.1)))
    assert expected == pytest.approx(p, rel=1e-5)
    standard_error = math.sqrt(p * (1 - p) / 50_000)
    assert abs(opened - p) <= 5 * standard_error


def test_gates_close_and_open():
    module = JoLA(H, D).eval()
    assert module.gate(torch.tensor([-20.0, 20.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "make", [LoFiT, lambda *a: LoFiT(*a, stage="select"), JoLA], ids=["v", "a", "jola"]
)
def test_starts_as_the_identity_with_a_gradient(make):
    module, z = make(H, D), torch.randn(B, T, H * D)
    out = module(z)
    assert torch.equal(out, z)
    (out * torch.randn_like(out)).sum().backward()
    assert sum(p.grad.abs().sum() for p in module.parameters() if p.grad is not None) > 0


def test_before_an_output_projection():
    """As a forward pre-hook of the projection, a bias on the heads becomes a bias after it."""

    def make():
        projection, module = torch.nn.Linear(H * D, 10), common.randomized(LoFiT(H, D, HEADS))
        W, b, v = (t.detach().clone() for t in (projection.weight, projection.bias, module.v))

        def engine(z, v):
            edit = functools.partial(torch.func.functional_call, module, {"v": v})
            handle = projection.register_forward_pre_hook(lambda _, args: (edit(args),))
            out = projection(z)
            handle.remove()
            return out

        def straightforward(z, v):
            offset = v.new_zeros(H, D).index_copy(0, torch.tensor(HEADS), v)
            return torch.nn.functional.linear(z, W.to(z), b.to(z)) + W.to(z) @ offset.flatten()

        return budget.Draw({"z": torch.randn(B, T, H * D), "v": v}, engine, straightforward)

    budget.check(make, torch.float32)


def test_heads_and_tokens_that_are_not_chosen_are_untouched():
    module, z = common.randomized(LoFiT(H, D, HEADS)), torch.randn(B, T, H * D)
    before = z.clone().view(-1, H, D)
    with torch.no_grad():
        after = module(z, rows=common.rows("cpu", *SELECTED), inplace=True).view(-1, H, D)
    changed = (after != before).any(-1)
    want = torch.zeros(B * T, H, dtype=torch.bool)
    for token in (5, 0, 2):
        want[token, list(HEADS)] = True
    assert torch.equal(changed, want)


def test_a_selection_serves_every_layer():
    z, rows = torch.randn(B, T, H * D), common.rows("cpu", *SELECTED)
    layers = [common.randomized(LoFiT(H, D, HEADS)) for _ in range(2)]
    selection = layers[0].select(z, rows)
    with torch.no_grad():
        for layer in layers:
            assert torch.equal(layer(z, rows=selection), layer(z, rows=rows))


def test_scores_rank_the_heads():
    module = LoFiT(H, D, stage="select")
    with torch.no_grad():
        module.a[2] = 3.0
    assert module.scores().argmax() == 2 and float(module.scores()[2]) == pytest.approx(3 * D**0.5)
    with pytest.raises(RuntimeError, match="^scores: the stage is 'tune'"):
        LoFiT(H, D).scores()


def test_refusals():
    with pytest.raises(
        ValueError, match=r"^heads: got \[0, 4\], expected different head numbers in \[0, 4\)"
    ):
        LoFiT(H, D, [0, 4])
    with pytest.raises(ValueError, match=r"^heads: got \[1, 1\]"):
        JoLA(H, D, [1, 1])
    with pytest.raises(ValueError, match="^heads: got \\[\\]"):
        LoFiT(H, D, [])
    with pytest.raises(ValueError, match="^stage: got 'both', expected one of tune, select"):
        LoFiT(H, D, stage="both")
    with pytest.raises(ValueError, match=r"^stretch: got \(0.1, 1.1\)"):
        JoLA(H, D, stretch=(0.1, 1.1))
    with pytest.raises(ValueError, match="^temperature: got 0"):
        JoLA(H, D, temperature=0)
    module, z = LoFiT(H, D), torch.randn(B, T, H * D)
    with pytest.raises(
        ValueError, match=r"^z: got shape \(2, 3, 27\).*expected a tensor \[\.\.\., 4 \* 7\]"
    ):
        module(z[..., 1:])
    with pytest.raises(ValueError, match="^rows: row 1 occurs more than once"):
        module(z, rows=common.rows("cpu", 1, 1))
    with pytest.raises(TypeError, match="^rows: got shape .*int64"):
        module(z, rows=torch.tensor([1]))
