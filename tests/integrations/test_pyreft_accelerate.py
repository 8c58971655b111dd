"""``accelerate_pyreft``: the outputs, gradients and training of pyreft."""

from __future__ import annotations

import copy

import pytest
import torch

pyreft = pytest.importorskip("pyreft", reason="the package pyreft is not installed")

from reft_kernels import functional  # noqa: E402
from reft_kernels.integrations import torch_orthogonal  # noqa: E402
from reft_kernels.integrations.pyreft import accelerate_pyreft  # noqa: E402
from reft_kernels.integrations.pyreft.locations import Locations  # noqa: E402
from tests.integrations.pyreft_models import CLASSES, RANK, build, hold, inputs, step, tied, untied  # noqa: E402
from tests.model.families import BATCH, BLOCKS, LAYERS, LENGTH, WIDTH, blocks, make  # noqa: E402

pytestmark = pytest.mark.transformers5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_outputs_and_gradients(kind, dtype):
    results = hold(lambda: build(kind, dtype=dtype), tied())
    assert len(results) > LAYERS


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["loreft", "nodireft"])
def test_untied_interventions_edit_one_after_the_other(kind, side):
    hold(lambda: build(kind, per_layer=2), untied(), side=side)


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta", "neox"])
def test_other_architectures(family):
    component = "block_output" if family == "gpt2" else BLOCKS[family] + "[{}].output"
    hold(lambda: build(family=family, component=component), tied(), family=family)


@pytest.mark.parametrize(
    "component", ["block_input", "mlp_output", "model.layers[{}].self_attn.o_proj.output"]
)
def test_other_components(component):
    hold(lambda: build(component=component), tied())


@pytest.mark.parametrize("kind", ["loreft", "noreft", "lobireft"])
def test_every_position(kind):
    """Without unit_locations, pyvene edits the whole sequence."""
    hold(lambda: build(kind), None)


def test_two_interventions_of_every_position():
    hold(lambda: build(per_layer=2), None)


def test_a_square_rotation_has_another_map():
    hold(lambda: build(rank=WIDTH), tied())


def test_a_module_that_serves_every_layer():
    def shared():
        intervention = pyreft.LoreftIntervention(
            embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32
        )
        config = [
            {
                "layer": i,
                "component": "block_output",
                "low_rank_dimension": RANK,
                "intervention": intervention,
            }
            for i in range(3)
        ]
        return pyreft.get_reft_model(make("llama"), pyreft.ReftConfig(representations=config))

    hold(shared, tied())


def test_repeated_slots_are_counted_repeatedly_in_the_gradient():
    """pyreft's scatter gives each of k equal slots the whole gradient.

    This is therefore not the gradient of the loss.
    """
    base, labels = inputs()
    doubled = {"sources->base": (None, [[[5, 5]] * BATCH] * LAYERS)}
    single = {"sources->base": (None, [[[5]] * BATCH] * LAYERS)}
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    theirs, ours = step(plain, base, doubled, labels), step(fast, base, doubled, labels)
    once = step(fast, base, single, labels)
    torch.testing.assert_close(ours["logits"], once["logits"], rtol=0, atol=0)
    last = [
        name
        for name in ours
        if name.startswith(f"layer_{LAYERS - 1}") and name.endswith("learned_source.weight")
    ]
    for name in last:
        torch.testing.assert_close(ours[name], 2 * once[name])
        torch.testing.assert_close(ours[name], theirs[name])
    assert last
    hold(build, doubled)


def test_nothing_else_is_written():
    """Rows without an edit equal those of the frozen model bit for bit."""
    reft_model = build()
    seen = {}
    block = blocks("llama", reft_model.model)[0]
    base, _ = inputs()
    with torch.no_grad():
        block.register_forward_hook(lambda m, a, out: seen.update(first=out.clone()))
        reft_model.model(**base)
        frozen = seen["first"]
        accelerate_pyreft(reft_model)
        # the edit changes this tensor in place after the hook
        block.register_forward_hook(lambda m, a, out: seen.update(edited=out))
        reft_model(base, unit_locations=tied())
    touched = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    for example, columns in enumerate(tied()["sources->base"][1][0]):
        touched[example, columns] = True
    different = (seen["edited"] != frozen).any(-1)
    assert torch.equal(different, touched)


# unexpected behaviour of pyreft that is reproduced, and one that is corrected


def test_signs_are_truncated_as_pyreft_does():
    """One step of AdamW with weight decay turns R's signs, and R, into zeros."""
    plain = build("loreft")
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base, labels = inputs()
    outputs = []
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(model.get_trainable_parameters(), lr=1e-3, weight_decay=0.1)
        step(model, base, tied(), labels)
        optimizer.step()
        outputs.append(model(base, unit_locations=tied())[1].logits)
        R = model.interventions[model.sorted_keys[0]].rotate_layer.weight
        assert R.abs().max() == 0
    torch.testing.assert_close(outputs[1], outputs[0])
    assert (outputs[1] - fast.model(**base).logits).abs().max() == 0  # no edit with R = 0


@pytest.mark.parametrize("unit_locations", [tied(), None], ids=["slots", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["loreft", "nodireft", "lobireft"])
def test_dropout_draws_pyrefts_masks(kind, dtype, unit_locations):
    """Dropout is applied to the edited state, slot by slot, and stays on after ``eval``.

    ``eval`` reaches the base model only.
    """

    def dropping():
        reft_model = build(kind, dtype=dtype, dropout=0.3)
        reft_model.eval()
        assert not reft_model.model.training
        return reft_model

    hold(dropping, unit_locations)
    off = dropping()
    base, _ = inputs()
    on = off(base, unit_locations=unit_locations)[1].logits
    for intervention in off.interventions.values():
        intervention.eval()
    accelerate_pyreft(off)
    states = torch.get_rng_state()
    without = off(base, unit_locations=unit_locations)[1].logits
    assert torch.equal(states, torch.get_rng_state())
    assert not torch.allclose(on, without)


def test_integer_positions_apply_to_one_batch_only():
    """Every batch is edited at its own positions.

    pyvene's use_fast edits later batches at the positions of the first example.
    """
    reft_model = build()
    base, labels = inputs()
    locations = tied(repeats=False)
    right = copy.deepcopy(reft_model)(base, unit_locations=locations)[1].logits
    fast = copy.deepcopy(reft_model)
    accelerate_pyreft(fast)
    for model in (reft_model, fast):
        one = model(base, unit_locations={"base": 2})[1].logits
        model(base, unit_locations={"sources->base": (None, 2)})
        model(base, unit_locations={"base": [1, 2]})
    assert reft_model.use_fast and not fast.use_fast
    torch.testing.assert_close(fast(base, unit_locations=locations)[1].logits, right)
    assert not torch.allclose(reft_model(base, unit_locations=locations)[1].logits, right)
    torch.testing.assert_close(fast(base, unit_locations={"base": 2})[1].logits, one)


# training


@pytest.mark.parametrize("kind", ["loreft", "direft"])
def test_a_hundred_steps_follow_pyrefts_loss_curve(kind):
    """The error of the losses is at most twice that of pyreft in fp32, against pyreft in fp64."""

    def train(dtype, accelerated):
        reft_model = build(kind, per_layer=2, moved=False)
        reft_model.model.to(dtype), reft_model.interventions.to(dtype)
        if accelerated:
            accelerate_pyreft(reft_model)
        optimizer = torch.optim.Adam(reft_model.get_trainable_parameters(), lr=2e-2, foreach=False)
        losses = []
        for index in range(100):
            base, labels = inputs(seed=index % 5)
            optimizer.zero_grad()
            loss = reft_model(base, unit_locations=untied(), labels=labels)[1].loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach().double())
        return torch.stack(losses)

    truth, theirs, ours = (
        train(torch.float64, False),
        train(torch.float32, False),
        train(torch.float32, True),
    )
    noise = (theirs - truth).abs().cummax(0).values
    assert ((ours - truth).abs() <= 2 * noise + torch.finfo(torch.float32).eps * truth.abs()).all()
    assert (truth[-5:] < 0.98 * truth[:5]).all()  # the loss decreases on each of the five batches


def test_a_forward_builds_once_what_its_layers_share(monkeypatch):
    """One Householder build and one set of rows per forward, and one edit per layer."""
    calls = []

    def counting(holder, name):
        function = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *a, **k: calls.append(name) or function(*a, **k))

    reft_model = build()
    accelerate_pyreft(reft_model)
    counting(torch_orthogonal, "householder")
    counting(functional, "apply_edit")
    counting(Locations, "_select")
    for name in ("_gather_intervention_output", "_scatter_intervention_output", "_cleanup_states"):
        counting(type(reft_model), name)
    base, labels = inputs()
    step(reft_model, base, tied(), labels)
    assert sorted(calls) == ["_select"] + ["apply_edit"] * LAYERS + ["householder"]
