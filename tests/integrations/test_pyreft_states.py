"""State dicts of the drop-in interventions, to and from the pyreft and pyvene classes.

Also settings, copies and cached builds.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from reft_kernels import orthonormality_error
from tests.integrations.pyreft_pairs import ALL, D, drop_in, moved, ours, pair, r, theirs, weight_of

pytestmark = pytest.mark.transformers5


@pytest.mark.parametrize("d", [D, r])  # PyTorch has another map for a square R
@pytest.mark.parametrize("name", ALL)
def test_state_dicts_go_both_ways_bit_for_bit(name, d, tmp_path):
    fused = moved(ours(name, d=d))
    torch.save(fused.state_dict(), tmp_path / "ours.bin")
    original = theirs(name, d=d)
    original.load_state_dict(torch.load(tmp_path / "ours.bin", weights_only=True))
    _same(fused, original)

    trained = moved(theirs(name, d=d))
    torch.save(trained.state_dict(), tmp_path / "theirs.bin")
    other = moved(ours(name, d=d))
    other.load_state_dict(torch.load(tmp_path / "theirs.bin", weights_only=True))
    _same(other, trained)
    again = ours(name, d=d)
    again.load_state_dict(other.state_dict())
    _same(again, trained)


def _same(fused, original):
    rest = {key: value for key, value in original.named_parameters() if "rotate_layer" not in key}
    for key, value in rest.items():
        assert torch.equal(dict(fused.named_parameters())[key], value), key
    if hasattr(original, "rotate_layer"):
        assert torch.equal(weight_of(fused), weight_of(original))


def test_R_is_loaded_exactly_and_stays_orthonormal_after_updates():
    fused, original = pair("Loreft", d=256, rank=16)
    assert torch.equal(weight_of(fused), weight_of(original))
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    for _ in range(3):
        fused(torch.randn(4, 2, 256)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(weight_of(fused), weight_of(original))
    assert orthonormality_error(fused.rotate_layer.build()[0]) <= 1e-6


def test_dtype_dropout_act_fn_and_bias_come_back_with_the_checkpoint(tmp_path):
    saved = ours("Noreft", dtype=torch.float32, dropout=0.25, act_fn="gelu_new", add_bias=True)
    torch.save(saved.state_dict(), tmp_path / "saved.bin")
    state = torch.load(tmp_path / "saved.bin", weights_only=True)
    fresh = drop_in.NoreftIntervention(embed_dim=D, low_rank_dimension=r)
    before = fresh.learned_source.weight
    fresh.load_state_dict(state)
    assert fresh.learned_source.weight is before and before.dtype == torch.float32
    assert fresh.dropout.p == 0.25
    base = torch.randn(2, 3, D)
    assert torch.equal(fresh.eval()(base), saved.eval()(base))
    named = drop_in.NoreftIntervention(
        embed_dim=D, low_rank_dimension=r, dropout=0.5, dtype=torch.bfloat16, add_bias=True
    )
    named.load_state_dict(state)
    assert named.dropout.p == 0.5 and named.learned_source.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="act_fn 'gelu_new', but the constructor was given 'relu'"):
        ours("Noreft", act_fn="relu").load_state_dict(state)


def _broken(change):
    state = moved(theirs("Loreft")).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update(weight=torch.zeros(r, D + 1)),
            r"learned_source.weight has shape \(4, 25\), expected \(4, 24\)",
        ),
        (
            lambda s: s.update(rotate_layer=torch.zeros(D, r + 1)),
            r"rotate_layer.weight has shape \(24, 5\), expected \(24, 4\)",
        ),
        (
            lambda s: s.update(rotate_layer=torch.zeros(D, r)),
            "rotate_layer.weight: rows are not orthonormal",
        ),
        (
            lambda s: s.update(rotate_layer=2 * s["rotate_layer"]),
            "rotate_layer.weight: rows are not orthonormal",
        ),
    ],
)
def test_a_bad_state_dict_changes_nothing(change, message):
    fused = ours("Loreft")
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError, match=message):
        fused.load_state_dict(_broken(change))
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("missing", ["weight", "bias", "rotate_layer"])
def test_a_missing_entry_is_named(missing):
    with pytest.raises(RuntimeError, match="Missing key"):
        ours("Loreft").load_state_dict(_broken(lambda s: s.pop(missing)))
    ours("Loreft").load_state_dict(_broken(lambda s: s.pop(missing)), strict=False)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours("Loreft").load_state_dict(_broken(lambda s: s.update(other=torch.zeros(1))))


def test_inside_another_module_nothing_is_lost():
    """pyreft's LoReFT omits its weights from the state dict of an enclosing module."""
    first = torch.nn.ModuleDict({name: moved(ours(name)) for name in ALL})
    second = torch.nn.ModuleDict({name: ours(name) for name in ALL})
    second.load_state_dict(first.state_dict())
    for name in ALL:
        _same(second[name], first[name])


def test_copies_pickles_and_half_precision():
    fused = moved(ours("Loreft"))
    base = torch.randn(2, 3, D)
    with torch.no_grad():
        want = fused(base)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert torch.equal(other(base), want)
            moved(other)
            assert not torch.equal(other(base), want) and torch.equal(fused(base), want)
        R = weight_of(fused)
        fused.to(torch.bfloat16)
        assert fused.learned_source.weight.dtype == torch.bfloat16
        assert torch.equal(weight_of(fused), R)


def test_R_is_built_once_until_something_changes(monkeypatch):
    from reft_kernels.integrations.pyreft import rotate

    calls = []
    build = rotate.build
    monkeypatch.setattr(
        rotate, "build", lambda *args, **kwargs: calls.append(1) or build(*args, **kwargs)
    )
    fused, base = ours("Loreft"), torch.randn(2, 3, D)
    fused(base).sum().backward()
    fused(base)
    assert len(calls) == 2
    with torch.no_grad():
        first = fused(base)
        assert torch.equal(fused(base), first) and len(calls) == 3
        fused.rotate_layer.X.add_(0.1)
        assert not torch.equal(fused(base), first) and len(calls) == 4
        fused.load_state_dict(ours("Loreft").state_dict())
        calls.clear()
        fused(base)
        fused.learned_source.weight.add_(0.1)
        fused(base)
        assert len(calls) == 2
