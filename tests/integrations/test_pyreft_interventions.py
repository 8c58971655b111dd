"""Drop-in interventions against pyreft's and pyvene's classes: values, gradients and errors."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call

pytest.importorskip("pyreft", reason="the package pyreft is not installed")

from reft_kernels.integrations.pyreft.rotate import parametrization_of_weight
from tests import budget
from tests.integrations.pyreft_pairs import (
    ALL,
    BASE,
    FREE,
    ROTATED,
    D,
    drop_in,
    moved,
    ours,
    pair,
    pyreft,
    pyvene,
    r,
    theirs,
    weight_of,
)
from tests.model.families import within

pytestmark = pytest.mark.transformers5


def _free_parameters(name):
    """Return the shapes of the trained parameters besides R."""
    linear = {"learned_source.weight": (r, D), "learned_source.bias": (r,)}
    return {
        "Loreft": linear,
        "Direft": linear,
        "Consreft": {"learned_source": (r,)},
        "Lobireft": {"learned_source": (r,)},
        "Noreft": {**linear, "proj_layer.weight": (r, D), "proj_layer.bias": (r,)},
        "Nodireft": {**linear, "proj_layer.weight": (r, D)},
        "LowRankRotatedSpace": {},
    }[name]


def _draw(name, dtype, act_fn):
    """Return inputs for both interventions.

    The original uses the base that we export, so that X has the same meaning in both.
    """
    fused = ours(name, dtype=dtype, act_fn=act_fn)
    original = theirs(name, dtype=dtype, act_fn=act_fn)
    original.load_state_dict(fused.state_dict())
    shape = (5, D) if name == "LowRankRotatedSpace" else (2, 3, D)
    inputs = {"base": torch.randn(shape).to(dtype)}
    if name == "LowRankRotatedSpace":
        inputs["source"] = torch.randn(shape).to(dtype)
    for key, size in _free_parameters(name).items():
        inputs[key.replace(".", "_")] = (torch.randn(size) / (D**0.5 if len(size) == 2 else 4)).to(
            dtype
        )
    rotated = name in ROTATED
    if rotated:
        # values that every dtype can represent
        inputs["X"] = (0.3 * torch.randn(D, r)).to(torch.bfloat16).float()
        base = original.state_dict()[BASE] if name != "Loreft" else None
        if base is None:
            base = parametrization_of_weight(weight_of(fused))[1]
        signs = torch.cat([fused.rotate_layer.base_signs, torch.ones(D - r)])

    def named(leaves, wanted):
        return {key: wanted(leaves[key.replace(".", "_")]) for key in _free_parameters(name)}

    def engine(base, source=None, X=None, **leaves):
        state = named(leaves, lambda t: t)
        if rotated:
            state["rotate_layer.X"] = signs.unsqueeze(1) * X * fused.rotate_layer.base_signs
        return functional_call(fused, state, (base, source))

    def plain(base, source=None, X=None, *, _base=base if rotated else None, **leaves):
        exact = base.dtype == torch.float64
        # vectors and R of the original are in fp32 for any dtype of the model
        keep = torch.float64 if exact else torch.float32
        state = named(leaves, lambda t: t.to(keep) if name in ("Consreft", "Lobireft") else t)
        if rotated:
            state[FREE] = X.to(keep).tril(-1) - torch.eye(D, r, dtype=keep)
            state[BASE] = _base.to(keep)
        return functional_call(original, state, (base, source))

    return budget.Draw(inputs, engine, plain)


ACTIVE = ["Loreft", "Noreft", "Direft", "Nodireft"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "act_fn"),
    [
        *((name, None) for name in ALL),
        *((name, act) for name in ACTIVE for act in ("relu", "gelu_new")),
    ],
)
def test_forward_and_every_gradient_equal_the_originals(name, dtype, act_fn):
    budget.check(lambda: _draw(name, dtype, act_fn), dtype, draws=4)


@pytest.mark.parametrize("name", ALL)
def test_shapes_as_pyvene_passes_them(name):
    fused, original = pair(name)
    for shape in [(2, D), (2, 3, D), (2, 3, 4, D), (0, 3, D)]:
        if name == "LowRankRotatedSpace" and len(shape) > 3:
            continue
        base, source = torch.randn(shape), torch.randn(shape)
        torch.testing.assert_close(fused(base, source), original(base, source))
    source = torch.randn(1, D)
    base = torch.randn(3, D)
    torch.testing.assert_close(fused(base, source), original(base, source))


@pytest.mark.parametrize("name", ALL)
def test_defaults_attributes_and_parameter_counts_are_the_originals(name):
    fused = getattr(drop_in, f"{name}Intervention")(
        embed_dim=D, low_rank_dimension=r, add_bias=False
    )
    package = pyvene if name == "LowRankRotatedSpace" else pyreft
    original = getattr(package, f"{name}Intervention")(
        embed_dim=D, low_rank_dimension=r, add_bias=False
    )
    assert sum(p.numel() for p in fused.parameters()) == sum(
        p.numel() for p in original.parameters()
    )
    for attribute in (
        "embed_dim",
        "interchange_dim",
        "keep_last_dim",
        "trainable",
        "is_source_constant",
        "is_repr_distributed",
    ):
        assert getattr(fused, attribute) == getattr(original, attribute), attribute
    for attribute in ("dropout", "act_fn", "learned_source", "proj_layer"):
        assert hasattr(fused, attribute) == hasattr(original, attribute), attribute
        if hasattr(original, attribute):
            assert type(getattr(fused, attribute)) is type(getattr(original, attribute))
    bases = set(type(original).__mro__) - {type(original)}
    assert bases <= set(type(fused).__mro__)
    if name in ROTATED:
        assert weight_of(fused).shape == (D, r) and weight_of(fused).dtype == torch.float32
        x = torch.randn(2, D)
        torch.testing.assert_close(fused.rotate_layer(x), x @ weight_of(fused))
    for key, value in original.state_dict().items():
        results = fused.state_dict()[key]
        assert (results.shape, results.dtype) == (value.shape, value.dtype), key
    assert fused.state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize("name", ROTATED)
def test_one_seed_starts_both_alike(name):
    torch.manual_seed(3)
    original = theirs(name, dtype=torch.bfloat16)
    torch.manual_seed(3)
    fused = ours(name, dtype=torch.bfloat16, same_random_draws=True)
    assert (weight_of(fused) - weight_of(original)).abs().max() <= 1e-6
    for key, value in original.state_dict().items():
        if "rotate_layer" not in key:
            assert torch.equal(fused.state_dict()[key], value), key


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    fused, base, source = ours(name), torch.randn(2, D), torch.randn(2, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = fused(base, source)
    assert torch.equal(got, fused(base, source))


def test_everything_starts_on_the_default_device():
    with torch.device("meta"):
        fused = [ours(name) for name in ALL]
    for intervention in fused:
        assert all(p.is_meta for p in intervention.parameters())
        if hasattr(intervention, "rotate_layer"):
            assert all(b.is_meta for b in intervention.rotate_layer.buffers())


def test_no_matrix_of_d_by_d_is_kept():
    for name in ROTATED:
        fused = ours(name, d=64)
        largest = max(t.numel() for t in [*fused.parameters(), *fused.buffers()])
        assert largest <= 64 * r


def test_the_output_may_be_changed_in_place_and_edits_may_be_large():
    fused, original = pair("Noreft")
    with torch.no_grad():
        for module in (fused, original):
            module.proj_layer.weight.mul_(30.0)
    base = torch.randn(2, 3, D)

    def gradients(module, dtype=torch.float32):
        leaf = base.clone().to(dtype).requires_grad_()
        out = module(leaf)
        out.mul_(0.5)
        out.square().sum().backward()
        return leaf.grad, module.learned_source.weight.grad

    for got, plain, exact in zip(
        gradients(fused),
        gradients(original),
        gradients(copy.deepcopy(original).double(), torch.float64),
        strict=True,
    ):
        assert within(got, plain, exact)


# dropout


@pytest.mark.parametrize("name", ["Loreft", "Noreft", "Lobireft", "Direft", "Nodireft"])
def test_dropout_is_the_originals_and_off_in_eval(name):
    fused, original = pair(name, dropout=0.5)
    base = torch.randn(2, 3, D)
    torch.manual_seed(1)
    got = fused(base)
    torch.manual_seed(1)
    want = original(base)
    torch.testing.assert_close(got, want)
    assert 0 < int((got == 0).sum()) < got.numel()
    torch.testing.assert_close(fused.eval()(base), original.eval()(base))


# bad arguments


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"embed_dim": None}, ValueError, "^embed_dim: got None, expected an integer"),
        (
            {"low_rank_dimension": None},
            ValueError,
            "^low_rank_dimension: got None, expected an integer",
        ),
        (
            {"low_rank_dimension": D + 1},
            ValueError,
            "^low_rank_dimension: got 25, expected an integer from 1 to 24",
        ),
        ({"low_rank_dimension": 0}, ValueError, "^low_rank_dimension: got 0"),
        ({"act_fn": "mish"}, ValueError, "^act_fn: got 'mish', expected None or a name"),
        ({"act_fn": "no such"}, ValueError, "^act_fn: got 'no such'"),
        ({"act_fn": 3}, ValueError, "^act_fn: got 3"),
        ({"dropout": 1.5}, ValueError, "dropout probability .* 1.5"),
        ({"dtype": torch.int8}, TypeError, "^dtype: got torch.int8, expected a floating-point"),
        ({"dtype": "bfloat16"}, TypeError, "^dtype: got 'bfloat16'"),
        (
            {"subspace_coeff": [1.0, 2.0]},
            ValueError,
            r"^subspace_coeff: got shape \(2,\), expected \[4\]",
        ),
    ],
)
def test_a_bad_keyword_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        drop_in.LoreftIntervention(**{"embed_dim": D, "low_rank_dimension": r, **kwargs})


@pytest.mark.parametrize(
    ("base", "subspaces", "error", "message"),
    [
        (
            torch.zeros(2, 3, D + 1),
            None,
            ValueError,
            r"^base: got shape \(2, 3, 25\), expected \[batch, ..., 24\]",
        ),
        (torch.zeros(D), None, ValueError, r"^base: got shape \(24,\)"),
        (
            torch.zeros(2, 3, D, dtype=torch.int32),
            None,
            TypeError,
            "^base: got shape .* torch.int32",
        ),
        ([1.0], None, TypeError, "^base: got list"),
        (
            torch.zeros(2, 3, D, device="meta"),
            None,
            ValueError,
            "^base: got device meta, expected cpu",
        ),
        (
            torch.zeros(2, 3, D),
            [[0]] * 3,
            ValueError,
            "^subspaces: got 3 lists, expected one for each of 2 examples",
        ),
        (
            torch.zeros(2, 3, D),
            [[0], [4]],
            ValueError,
            r"^subspaces: example 1: got 4, .* in \[0, 4\)",
        ),
        (torch.zeros(2, 3, D), [[-1], [0]], ValueError, "^subspaces: example 0: got -1"),
        (
            torch.zeros(2, 3, D),
            [[0, 0], [0]],
            ValueError,
            "^subspaces: example 0: .* more than once",
        ),
        (
            torch.zeros(2, 3, D),
            [0, 1],
            TypeError,
            "^subspaces: example 0: got int 0, expected a list",
        ),
        (torch.zeros(2, 3, D), 1, TypeError, "^subspaces: got int, expected a list of columns"),
    ],
)
def test_a_bad_argument_of_forward_is_named(base, subspaces, error, message):
    with pytest.raises(error, match=message):
        ours("Loreft")(base, subspaces=subspaces)


def test_bad_sources_partitions_and_replaced_activations_are_named():
    das, base = ours("LowRankRotatedSpace", subspace_partition=[[0, 2], [2, 9]]), torch.zeros(2, D)
    with pytest.raises(TypeError, match="^source: got NoneType"):
        das(base, None)
    with pytest.raises(ValueError, match=r"^source: got shape \(3, 24\), expected \(2, 24\)"):
        das(base, torch.zeros(3, D))
    with pytest.raises(
        ValueError, match=r"^subspace_partition: got columns .* expected columns of R in \[0, 4\)"
    ):
        das(base, base, [[1], [0]])
    fused = ours("Loreft")
    fused.act_fn = torch.nn.Tanh()
    with pytest.raises(ValueError, match="^act_fn: got Tanh since construction"):
        fused(torch.zeros(2, 3, D))


def test_the_weight_can_be_set():
    fused, R = moved(ours("Loreft")), torch.linalg.qr(torch.randn(D, r)).Q
    fused.rotate_layer.weight = R
    assert torch.equal(weight_of(fused), R)
    with pytest.raises(ValueError, match=r"^weight: got shape \(4, 24\), expected \(24, 4\)"):
        fused.rotate_layer.weight = R.mT
    with pytest.raises(ValueError, match="^weight: rows are not orthonormal"):
        fused.rotate_layer.weight = 2 * R
    assert torch.equal(weight_of(fused), R)


def test_the_package_imports_without_pyreft():
    code = (
        "import sys; sys.modules['pyreft'] = None; from reft_kernels.integrations.pyreft import "
        "LoreftIntervention"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = drop_in.nothing
