"""Drop-in interventions in pyreft's and pyvene's models: training, train and eval, saving."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pyreft", reason="the package pyreft is not installed")

from reft_kernels import orthonormality_error
from reft_kernels.integrations.pyreft.rotate import parametrization_of_weight
from tests.integrations.pyreft_pairs import (
    BASE,
    FREE,
    LAYERS,
    REFT,
    ROTATED,
    WIDTH,
    D,
    batch,
    drop_in,
    make,
    model_inputs,
    moved,
    ours,
    pair,
    pyreft,
    pyvene,
    r,
    theirs,
)
from tests.integrations.pyreft_pairs import reft_model as build
from tests.model.families import within

pytestmark = pytest.mark.transformers5


def _train(reft_model, optimizer, steps=3):
    inputs, options = model_inputs()
    optimizer = optimizer(list(reft_model.get_trainable_parameters()))
    losses = []
    for _ in range(steps):
        _, outputs = reft_model(inputs, **options)
        outputs.loss.backward()
        optimizer.step()
        reft_model.set_zero_grad()
        losses.append(outputs.loss.detach())
    return torch.stack(losses)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", REFT)
def test_training_in_get_reft_model_follows_the_originals_loss(name, optimizer):
    fused = build(ours, name)
    runs = []
    for dtype in (torch.float32, torch.float64):
        original = build(theirs, name, dtype)
        for (_, source), target in zip(
            fused.interventions.items(), original.interventions.values(), strict=True
        ):
            state = source.state_dict()
            # pyreft's load leaves its base not orthogonal, so R would not stay orthonormal
            if name == "Loreft":
                target.learned_source.load_state_dict({k: state[k] for k in ("weight", "bias")})
                free, base = parametrization_of_weight(state["rotate_layer"])
                target.rotate_layer.load_state_dict(
                    {
                        FREE.removeprefix("rotate_layer."): free,
                        BASE.removeprefix("rotate_layer."): base,
                    }
                )
            else:
                target.load_state_dict(state)
        runs.append(_train(original, OPTIMIZERS[optimizer]))
    plain, exact = runs
    got = _train(fused, OPTIMIZERS[optimizer])
    assert exact[0] - exact[-1] > 1e-3  # the loss decreases
    assert within(got, plain, exact), (got.double() - exact, plain.double() - exact)


def test_train_and_eval_of_the_reft_model_reach_the_dropout():
    reft_model = build(ours, "Loreft", dropout=0.5)
    inputs, options = model_inputs()

    def logits():
        with torch.no_grad():
            return reft_model(inputs, **options)[1].logits

    reft_model.train()
    assert not torch.equal(logits(), logits())
    reft_model.eval()
    assert torch.equal(logits(), logits())
    reft_model.train()
    assert all(v.training for v in reft_model.interventions.values())


def test_train_and_eval_leave_other_interventions_alone():
    reft_model = build(theirs, "Loreft", dropout=0.5)
    reft_model.eval()
    assert all(v.training for v in reft_model.interventions.values())


def test_subspaces_in_a_model():
    reft_model = build(ours, "Loreft")
    inputs, options = model_inputs()
    with torch.no_grad():
        every = reft_model(inputs, **options)[1].logits
        frozen = reft_model.model(**inputs).logits
        none = reft_model(inputs, **options, subspaces=[[[], [], []]] * LAYERS)[1].logits
        one = reft_model(inputs, **options, subspaces=[[[0], [0], []]] * LAYERS)[1].logits
    assert torch.equal(none, frozen)
    assert (
        torch.equal(one[2], frozen[2])
        and not torch.equal(one[0], frozen[0])
        and not torch.equal(one[0], every[0])
    )


def test_das_in_pyvenes_model():
    logits = []
    fused, original = pair("LowRankRotatedSpace", d=WIDTH)
    for intervention in (fused, original):
        config = pyvene.IntervenableConfig(
            [
                {
                    "layer": 1,
                    "component": "block_output",
                    "low_rank_dimension": r,
                    "intervention": intervention,
                }
            ]
        )
        model = pyvene.IntervenableModel(config, make("llama"))
        ids = batch("llama")["input_ids"]
        with torch.no_grad():
            results = model({"input_ids": ids}, [{"input_ids": ids.flip(0)}], {"sources->base": 3})
        logits.append(results[1].logits)
    torch.testing.assert_close(*logits)


def test_saved_and_loaded_by_pyvene(tmp_path):
    """Dropout, act_fn, dtype and bias are restored from the state dicts."""
    reft_model = build(ours, "Noreft", dropout=0.3, act_fn="silu")
    for intervention in reft_model.interventions.values():
        moved(intervention)
    reft_model.save(str(tmp_path / "reft"))
    loaded = pyreft.ReftModel.load(str(tmp_path / "reft"), make("llama"))
    reft_model.eval()
    loaded.eval()
    inputs, options = model_inputs()
    with torch.no_grad():
        assert torch.equal(
            loaded(inputs, **options)[1].logits, reft_model(inputs, **options)[1].logits
        )
    for fused in loaded.interventions.values():
        assert type(fused) is drop_in.NoreftIntervention and fused.dropout.p == 0.3
        assert fused.learned_source.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ROTATED)
def test_weight_decay_keeps_R_orthonormal(name):
    fused = ours(name)
    optimizer = torch.optim.AdamW(fused.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(30):
        fused(torch.randn(4, D), torch.randn(4, D)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert orthonormality_error(fused.rotate_layer.build()[0]) <= 1e-6
