"""Calls of an accelerated pyreft model: return values, saving, restoring, generation and errors."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from packaging import version

pyreft = pytest.importorskip("pyreft", reason="the package pyreft is not installed")

import pyvene  # noqa: E402

from reft_kernels.integrations import pyreft as drop_in  # noqa: E402
from reft_kernels.integrations.pyreft import accelerate_pyreft  # noqa: E402
from tests.integrations.pyreft_models import CLASSES, RANK, build, hold, inputs, move, step, tied  # noqa: E402
from tests.model.families import BATCH, LAYERS, LENGTH, WIDTH, blocks, hook_count, make, mask_of  # noqa: E402


def test_returns_what_pyreft_returns(capsys):
    plain = build()
    fast = copy.deepcopy(plain)
    acceleration = accelerate_pyreft(fast)
    base, labels = inputs()
    for keywords in (
        {},
        {"output_original_output": True},
        {"return_dict": True},
        {"use_cache": False, "labels": labels},
    ):
        theirs, ours = (m(base, unit_locations=tied(), **keywords) for m in (plain, fast))
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        if not keywords.get("return_dict"):
            assert (ours[0] is None) == (theirs[0] is None) and type(ours[1]) is type(theirs[1])
            assert (ours[1].past_key_values is None) == (theirs[1].past_key_values is None)
            assert (ours[1].loss is None) == (theirs[1].loss is None)
    assert [n for n, _ in fast.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert fast.state_dict().keys() == plain.state_dict().keys()
    before = {id(p) for p in fast.parameters()}
    acceleration.restore()
    assert {id(p) for p in fast.parameters()} == before
    capsys.readouterr()
    for model in (plain, fast):
        model.print_trainable_parameters()
    first, second = capsys.readouterr().out.split("trainable intervention")[1:]
    assert first == second


def test_restore_puts_everything_back():
    reft_model = build()
    before, base = dict(reft_model.__dict__), inputs()[0]
    want = reft_model(base, unit_locations=tied())[1].logits
    acceleration = accelerate_pyreft(reft_model)
    assert reft_model.forward.__class__.__module__.startswith("reft_kernels")
    reft_model(base, unit_locations=tied())
    assert hook_count(reft_model.model) == 0
    assert acceleration.restore() is reft_model
    assert reft_model.__dict__.keys() == before.keys() and "forward" not in reft_model.__dict__
    assert torch.equal(reft_model(base, unit_locations=tied())[1].logits, want)
    with pytest.raises(RuntimeError, match="restore"):
        acceleration.restore()
    with accelerate_pyreft(reft_model) as inside:
        assert inside is reft_model and "forward" in reft_model.__dict__
    assert "forward" not in reft_model.__dict__ and "generate" not in reft_model.__dict__


def test_a_copy_runs_its_own_modules():
    first = build()
    accelerate_pyreft(first)
    second = copy.deepcopy(first)
    base, _ = inputs()
    want = first(base, unit_locations=tied())[1].logits
    move(second, seed=11)
    assert not torch.allclose(second(base, unit_locations=tied())[1].logits, want)
    assert torch.equal(first(base, unit_locations=tied())[1].logits, want)


def test_hooks_of_others_stay_and_errors_leave_none_behind():
    reft_model = build()
    accelerate_pyreft(reft_model)
    seen = []
    block = blocks("llama", reft_model.model)[1]
    block.register_forward_hook(lambda *_: seen.append(1) and None)
    base, _ = inputs()
    for _ in range(2):
        reft_model(base, unit_locations=tied())
    assert len(seen) == 2 and hook_count(reft_model.model) == 1
    with pytest.raises(
        ValueError, match=rf"positions from 0 to {LENGTH}, expected them in \[0, {LENGTH}\)"
    ):
        reft_model(base, unit_locations={"sources->base": (None, [[[0, LENGTH]] * BATCH] * LAYERS)})
    assert hook_count(reft_model.model) == 1


def test_save_and_load_keep_working(tmp_path):
    """After loading R, pyreft's base is not orthogonal. Edit and training still follow pyreft."""
    saved = build()
    accelerate_pyreft(saved)
    base, _ = inputs()
    want = saved(base, unit_locations=tied())[1].logits
    saved.save(str(tmp_path / "saved"))

    def load(reft_model):  # as pyvene's load_intervention, which requires cuda:0
        for key, intervention in reft_model.interventions.items():
            intervention.load_state_dict(
                torch.load(tmp_path / "saved" / f"intkey_{key}.bin", weights_only=True)
            )
        return reft_model

    fresh = load(build(moved=False))
    accelerate_pyreft(fresh)
    torch.testing.assert_close(fresh(base, unit_locations=tied())[1].logits, want)
    load(fresh)  # pyreft replaces the rotate layers of an accelerated model
    torch.testing.assert_close(fresh(base, unit_locations=tied())[1].logits, want)

    def loaded():
        reft_model = load(build(moved=False))
        move(reft_model, scale=0.1)
        return reft_model

    intervention = next(iter(loaded().interventions.values())).rotate_layer.weight
    assert (intervention.mT @ intervention - torch.eye(RANK)).abs().max() > 1e-3
    hold(loaded, tied())


def test_an_existing_optimizer_keeps_working():
    reft_model = build()
    optimizer = torch.optim.SGD(reft_model.get_trainable_parameters(), lr=0.1)
    base, labels = inputs()
    accelerate_pyreft(reft_model)
    before = {n: p.detach().clone() for n, p in reft_model.interventions.named_parameters()}
    step(reft_model, base, tied(), labels)
    optimizer.step()
    assert all(
        not torch.equal(p, before[n]) for n, p in reft_model.interventions.named_parameters()
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_drop_in_classes_are_supported(kind):
    """Drop-in classes work by pyvene's hooks and accelerated."""
    cls, keywords = CLASSES[kind]
    intervention = getattr(drop_in, cls.__name__)
    dropped = {"dropout": 0.2} if "consreft" not in kind else {}
    plain = build(kind, classes={kind: (intervention, keywords)}, **dropped)
    for intervention in plain.interventions.values():
        intervention.subspace_coeff = [1.0, -1.0, 0.0, 0.5]
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base, labels = inputs()
    results = []
    for model in (plain, fast):
        torch.manual_seed(0)
        results.append(step(model, base, tied(), labels))
    theirs, ours = results
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """pyreft uses the base model's switch.

    From transformers 5.23 on, hooks run outside of the recomputed part.
    """
    if version.parse(transformers.__version__) < version.parse("5.23"):
        pytest.skip(
            "transformers before 5.23 recomputes a layer with its hooks, which pyvene and this "
            "remove after the forward"
        )
    fast = build()
    accelerate_pyreft(fast)
    base, labels = inputs()
    want = step(fast, base, tied(), labels)
    fast.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.model.train()
    got = step(fast, base, tied(), labels)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base, _ = inputs()
    with mode():
        for locations in (tied(), None):
            theirs, ours = (m(base, unit_locations=locations)[1].logits for m in (plain, fast))
            torch.testing.assert_close(ours, theirs)
            assert not ours.requires_grad


# calls that are left to pyvene, and errors


@pytest.mark.parametrize(
    "given",
    [
        {"subspaces": [[[0, 1]] * BATCH] * LAYERS},
        {"sources": "base"},
        {"source_representations": "base"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_unsupported_calls_are_passed_to_pyvene(given):
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base, _ = inputs()
    if "sources" in given:
        given = {"sources": [base] * LAYERS}
        locations = {"sources->base": (tied()["sources->base"][1], tied()["sources->base"][1])}
    else:
        locations = tied()
        if "source_representations" in given:
            given = {"source_representations": {plain.sorted_keys[0]: torch.zeros(BATCH, 4, WIDTH)}}
    cleaned = []
    clean = fast._cleanup_states
    fast._cleanup_states = lambda *a, **k: cleaned.append(1) or clean(*a, **k)
    theirs, ours = (m(base, unit_locations=locations, **given)[1].logits for m in (plain, fast))
    assert torch.equal(ours, theirs) and cleaned


class Own(pyreft.LoreftIntervention):
    def forward(self, base, source=None, subspaces=None):
        return base


class Renamed(pyreft.LoreftIntervention):
    """A subclass with the same edit as its parent."""


def config_of(cls, **more):
    intervention = cls(embed_dim=WIDTH, low_rank_dimension=RANK, dtype=torch.float32)
    return {
        "layer": 0,
        "component": "block_output",
        "low_rank_dimension": RANK,
        "intervention": intervention,
        **more,
    }


def reft_of(*configs, **keywords):
    return pyreft.ReftModel(
        pyreft.ReftConfig(representations=list(configs), **keywords), make("llama")
    )


def test_unsupported_models_raise_and_are_unchanged():
    linked = [
        config_of(pyreft.LoreftIntervention, intervention_link_key=0, layer=i) for i in range(2)
    ]
    cases = [
        (reft_of(config_of(Own)), TypeError, "Own, expected one of pyreft's LoreftIntervention"),
        (reft_of(config_of(pyvene.ZeroIntervention)), TypeError, "ZeroIntervention"),
        (
            reft_of(config_of(drop_in.LowRankRotatedSpaceIntervention)),
            TypeError,
            "LowRankRotatedSpaceIntervention",
        ),
        (build("loreft", act_fn="mish"), ValueError, "act_fn: got MishActivation"),
        (reft_of(config_of(pyreft.LoreftIntervention, unit="h.pos")), ValueError, "unit 'h.pos'"),
        (
            reft_of(config_of(pyreft.LoreftIntervention, component="head_query_output")),
            ValueError,
            "a part of",
        ),
        (reft_of(*linked), ValueError, "intervention_link_key"),
        (reft_of(config_of(pyreft.LoreftIntervention), mode="serial"), ValueError, "mode 'serial'"),
        (reft_of(), ValueError, "no interventions"),
        (make("llama"), TypeError, "got LlamaForCausalLM"),
    ]
    for model, error, text in cases:
        before = dict(model.__dict__)
        with pytest.raises(error, match=text):
            accelerate_pyreft(model)
        assert model.__dict__.keys() == before.keys()
    twice = reft_of(config_of(Renamed))
    accelerate_pyreft(twice)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate_pyreft(twice)


@pytest.mark.parametrize(
    ("unit_locations", "error", "text"),
    [
        (
            {"sources->base": (None, [[[0]] * BATCH] * 2)},
            ValueError,
            f"for 2 interventions, expected {LAYERS}",
        ),
        (
            {"sources->base": (None, [[[0]] * (BATCH - 1)] * LAYERS)},
            ValueError,
            f"for {BATCH - 1} examples, expected {BATCH}",
        ),
        ({"sources->base": (None, [[[0], [0, 1], [0]]] * LAYERS)}, ValueError, "rectangular"),
        ({"sources->base": (None, [[[-1]] * BATCH] * LAYERS)}, ValueError, "from -1 to -1"),
        (
            {"sources->base": (None, [[[0.5]] * BATCH] * LAYERS)},
            TypeError,
            "float32, expected integers",
        ),
        (
            {"sources->base": (None, [[0] * BATCH] * LAYERS)},
            ValueError,
            r"expected \[batch\]\[positions\]",
        ),
        ({"sources->base": (None, None)}, TypeError, "unit_locations"),
        ({"base->sources": 0}, ValueError, "expected a dict with 'sources->base'"),
        ([[0]], ValueError, "expected a dict with 'sources->base'"),
    ],
)
def test_wrong_positions(unit_locations, error, text):
    reft_model = build()
    accelerate_pyreft(reft_model)
    with pytest.raises(error, match=text):
        reft_model(inputs()[0], unit_locations=unit_locations)
    assert hook_count(reft_model.model) == 0


def test_positions_as_tensors_and_for_some_layers_only_and_empty():
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base, _ = inputs()
    nested = tied()["sources->base"][1]
    want = plain(base, unit_locations=tied())[1].logits
    torch.testing.assert_close(
        fast(base, unit_locations={"sources->base": (None, torch.tensor(nested))})[1].logits, want
    )
    some = {"sources->base": (None, [nested[0], None, nested[2]])}
    torch.testing.assert_close(
        fast(base, unit_locations=some)[1].logits, plain(base, unit_locations=some)[1].logits
    )
    empty = {"sources->base": (None, [[[]] * BATCH] * LAYERS)}
    assert torch.equal(fast(base, unit_locations=empty)[1].logits, fast.model(**base).logits)


# generation


def prompts(side):
    mask = mask_of([LENGTH, 15, 9], side)
    generator = torch.Generator().manual_seed(5)
    return {
        "input_ids": torch.randint(3, 97, (BATCH, LENGTH), generator=generator) * mask,
        "attention_mask": mask,
    }


def prompt_locations(base, repeat=1):
    columns = []
    for mask in base["attention_mask"]:
        real = mask.nonzero().flatten().tolist()
        columns += [real[:2] + real[-2:]] * repeat
    return {"sources->base": (None, [columns] * LAYERS)}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["prompt", "later", "every"])
def test_generation(how, side, beams):
    """Edits of the prompt only, of each later token, and, without positions, of everything."""
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base = prompts(side)
    more = {
        "prompt": {"intervene_on_prompt": True, "unit_locations": prompt_locations(base, beams)},
        "later": {"unit_locations": {"sources->base": (None, [[[0]] * BATCH * beams] * LAYERS)}},
        "every": {"intervene_on_prompt": True},
    }[how]
    more |= {
        "max_new_tokens": 8,
        "num_beams": beams,
        "do_sample": False,
        "eos_token_id": 96,
        "pad_token_id": 0,
    }
    more |= {"output_scores": True, "return_dict_in_generate": True}
    theirs, ours = plain.generate(base, **more)[1], fast.generate(base, **more)[1]
    assert torch.equal(ours.sequences, theirs.sequences)
    exact = copy.deepcopy(plain)
    exact.model.double(), exact.interventions.double()
    truth = exact.generate(base, **more)[1]
    assert torch.equal(truth.sequences, theirs.sequences)
    noise = [torch.stack(t.scores).double() - torch.stack(truth.scores) for t in (ours, theirs)]
    # finished beams have scores of -inf
    error, straightforward = (float(n.nan_to_num().abs().max()) for n in noise)
    finite = torch.stack(truth.scores)
    rounding = torch.finfo(torch.float32).eps * float(finite[finite.isfinite()].abs().max())
    assert error <= 2 * straightforward + rounding
    frozen = plain.model.generate(
        **base,
        **{k: v for k, v in more.items() if k not in ("unit_locations", "intervene_on_prompt")},
    )
    assert not torch.equal(frozen.sequences, theirs.sequences)
    assert hook_count(fast.model) == 0


def test_beams_of_positions_given_once():
    """The beams of an example share its positions, for which pyvene raises."""
    fast = build()
    accelerate_pyreft(fast)
    base = prompts("left")
    more = {
        "intervene_on_prompt": True,
        "max_new_tokens": 6,
        "num_beams": 3,
        "do_sample": False,
        "pad_token_id": 0,
    }
    once = fast.generate(base, unit_locations=prompt_locations(base), **more)[1]
    repeated = fast.generate(base, unit_locations=prompt_locations(base, 3), **more)[1]
    assert torch.equal(once, repeated)


def test_generate_without_positions_edits_each_later_token():
    plain = build()
    fast = copy.deepcopy(plain)
    accelerate_pyreft(fast)
    base = prompts("left")
    more = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "output_original_output": True,
    }
    theirs, ours = plain.generate(base, **more), fast.generate(base, **more)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
