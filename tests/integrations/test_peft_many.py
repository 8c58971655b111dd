"""Several adapters in one batch: one edit a layer, each example equal to its adapter alone."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import cross_entropy

import reft_kernels as rk
from reft_kernels import dispatch
from reft_kernels.integrations.peft import ReftConfig, share_build
from reft_kernels.interventions import banks, members
from tests.model.families import LAYERS, VOCAB, batch, make, mask_of, shake, within

BASE = "__base__"
NATIVE = dispatch.unsupported_reason("cpu", "edit", "cpu", torch.float32) is None
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}


def reft(**kwargs) -> ReftConfig:
    return ReftConfig(**{"rank": 4, "positions": "f2+l2", "init": "orthogonal", **kwargs})


# one formula: with a linear activation LoReFT, DiReFT and NodiReFT all read and write
LINEAR = {
    "a": reft(),
    "b": reft(rank=7, positions="l5", intervention="nodireft"),
    "c": reft(rank=2, positions="prompt", layers=[0, 2], intervention="direft"),
    "d": reft(rank=3, share_weights=False),
}
KINDS = {
    "gelu": reft(activation="gelu"),
    "noreft": reft(rank=2, activation="gelu", intervention="noreft"),
    "sigmoid": reft(rank=3, activation="sigmoid", intervention="direft"),
    "constant": reft(intervention="consreft"),
    "red": reft(intervention="red", init=None),
    "red2": reft(intervention="red", init=None, positions="l3"),
    "mlp": reft(component="mlp_output"),
}


def build(configs=LINEAR, family="llama", layers=None):
    """A model with adapters; with ``layers``, a Llama of so many."""
    names, base = list(configs), make(family)
    if layers is not None:
        base.model.layers = base.model.layers[:layers]
        base.config.num_hidden_layers = layers
    model = get_peft_model(base, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    for seed, name in enumerate(names):
        model.set_adapter(name)
        shake(model, seed=seed)
    model.base_model.set_adapter(names)  # all are trainable
    return model.eval()


def inputs_for(names, side="right", labels=False, family="llama"):
    inputs = batch(family, side=side)
    if not labels:
        inputs.pop("labels", None)
    repeats = -(-len(names) // 3)
    return {k: torch.cat([v] * repeats)[: len(names)] for k, v in inputs.items()}


def alone(model, name, call):
    """What ``call`` returns with one adapter active, or none."""
    if name == BASE:
        with model.disable_adapter():
            return call()
    before = list(model.base_model.active_adapters)
    model.base_model.set_adapter([name])
    try:
        return call()
    finally:
        model.base_model.set_adapter(before)


@pytest.fixture
def launches(monkeypatch):
    """The number of sets of each edit: 0 without weight ids."""
    calls = []

    def counted(function):
        def call(hidden, weights, chosen, *rest):
            calls.append(
                0 if chosen.weight_ids is None else len(weights[-1 if len(weights) == 2 else 2])
            )
            return function(hidden, weights, chosen, *rest)

        return call

    from reft_kernels.interventions import base

    for module, name in (
        (banks, "apply_edit"),
        (banks, "apply_red"),
        (base, "apply_edit"),
        (members, "apply_red"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("configs", [LINEAR, KINDS], ids=["linear", "kinds"])
@pytest.mark.skipif(not NATIVE, reason="the native CPU library is not built")
def test_each_example_has_the_bits_of_its_adapter_alone(configs, side):
    """On the cpu backend zero rows behind a matrix change no bit of what its own rows give."""
    model, names = build(configs), [*configs, BASE, *reversed(configs)]
    inputs = inputs_for(names, side)
    with rk.backend("cpu"), torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for name in configs.keys() | {BASE}:
            want = alone(model, name, lambda: model(**inputs).logits)
            for row in (r for r, n in enumerate(names) if n == name):
                assert torch.equal(mixed[row], want[row]), (name, row)


def test_the_reference_backend_stays_within_the_error_budget():
    """Its matrix products sum in an order that depends on the rank, so bits differ with padding."""
    model, names = build(), [*LINEAR, BASE]
    exact, inputs = build().double(), inputs_for(names)
    with rk.backend("torch"), torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            plain = alone(model, name, lambda: model(**inputs).logits)[row]
            fp64 = alone(exact, name, lambda: exact(**inputs).logits)[row]
            assert within(mixed[row], plain, fp64)
        same = build({n: reft() for n in "xyz"})
        names = [*"xyz", BASE]
        mixed = same(**inputs_for(names), adapter_names=names).logits
        for row, name in enumerate(names):  # without padding the bits are the same here too
            assert torch.equal(
                mixed[row], alone(same, name, lambda: same(**inputs_for(names)).logits)[row]
            )


def test_one_launch_for_each_formula_and_site(launches):
    model, names = build(), [*LINEAR, BASE]
    with torch.no_grad():
        model(**inputs_for(names), adapter_names=names)
    assert launches == [5, 4, 5]  # sets: "d" has two, and layer 1 is not edited by "c"
    del launches[:]
    with torch.no_grad():
        model(**inputs_for("aa"), adapter_names=["a", BASE])
    assert launches == [0] * LAYERS  # a single adapter is not padded
    del launches[:]
    kinds, names = build(KINDS), list(KINDS)
    with torch.no_grad():
        kinds(**inputs_for(names), adapter_names=names)
    # block outputs: gelu with noreft, sigmoid, constant, red with red2; and the MLPs' outputs
    assert len(launches) == LAYERS * 5 and sorted(launches) == [0] * 9 + [2] * 6


def test_the_bank_is_built_once_and_again_when_weights_change(monkeypatch):
    model, names = build(), ["a", "b", "c"]
    built = []
    stack_sets = banks.stack_sets
    monkeypatch.setattr(banks, "stack_sets", lambda a: built.append(len(a)) or stack_sets(a))
    inputs = inputs_for(names)

    def call(names):
        with torch.no_grad():
            return model(**inputs, adapter_names=names).logits

    first = call(names)
    assert built == [3, 2]  # layers 0 and 2 with all three, layer 1 without "c"
    assert torch.equal(call(names), first)
    call(["b", "a", BASE])
    assert built == [3, 2]
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".a." in n and n.endswith(".b")).add_(1.0)
    changed = call(names)
    assert built == [3, 2] * 2
    assert not torch.equal(changed[0], first[0]) and torch.equal(changed[1:], first[1:])
    model.delete_adapter("a")
    assert torch.equal(call(["c", "b", BASE])[1], call(["b"] * 3)[1])
    with torch.inference_mode():  # what it keeps serves a later backward, too
        inference = model(**inputs, adapter_names=["b", "c", BASE]).logits
    assert torch.equal(model(**inputs, adapter_names=["b", "c", BASE]).logits, inference)


def gradients(model):
    return {
        n: None if p.grad is None else p.grad.clone()
        for n, p in model.named_parameters()
        if "reft_stack" in n
    }


def summed_loss(logits, labels):
    """A sum over the examples, so that each gradient is independent of the others."""
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum"
    )


@pytest.mark.parametrize(
    ("configs", "mode"),
    [
        *((LINEAR, mode) for mode in ("plain", "checkpointing", "reentrant", "shared")),
        (KINDS, "plain"),
    ],
    ids=["plain", "checkpointing", "reentrant", "shared", "kinds"],
)
def test_each_adapter_is_trained_on_its_own_examples(configs, mode):
    backend = "cpu" if NATIVE else "torch"
    model, order = build(configs), list(configs)
    idle, frozen = order[-1], order[1]
    names = [*order[:-1], BASE, order[0]]
    inputs = inputs_for(names, labels=True)
    labels = inputs["labels"]
    for name, parameter in model.named_parameters():
        if f".{frozen}." in name:
            parameter.requires_grad_(False)
    model.train()
    if mode in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model.enable_input_require_grads()

    def step(subject, part, call):
        subject.zero_grad()
        rows = [r for r, n in enumerate(names) if part in (None, n)]
        picked = {k: v[rows] for k, v in inputs.items()}
        out = subject(**picked, **({"adapter_names": names} if part is None else {}))
        summed_loss(out.logits, labels[rows]).backward()
        return gradients(subject)

    with rk.backend(backend):
        if mode == "shared":
            with share_build(model) as shared:
                mixed = step(model, None, None) and (shared.flush(), gradients(model))[1]
        else:
            mixed = step(model, None, None)
        exact = build(configs).double().train()
        for name in order:
            mine = [n for n in mixed if f".{name}." in n]
            if name in (idle, frozen):
                assert all(mixed[n] is None for n in mine)
                continue
            plain = alone(model, name, lambda name=name: step(model, name, None))
            fp64 = alone(exact, name, lambda name=name: step(exact, name, None))
            for n in mine:
                assert plain[n].abs().max() > 0
                assert within(mixed[n], plain[n], fp64[n]), n


def test_dropout_is_drawn_with_the_probability_of_each_adapter(monkeypatch):
    model = build({"p0": reft(), "p50": reft(dropout=0.5), "p75": reft(rank=7, dropout=0.75)})
    masks = []
    apply = banks.apply_edit
    monkeypatch.setattr(
        banks,
        "apply_edit",
        lambda h, w, chosen, *rest: masks.append(chosen) or apply(h, w, chosen, *rest),
    )
    names = ["p0", "p50", "p75"]
    inputs = inputs_for(names, labels=True)
    model.train()(**inputs, adapter_names=names).logits.sum().backward()
    assert len(masks) == LAYERS
    for chosen in masks:
        values = [set(chosen.coeff[chosen.weight_ids == s].flatten().tolist()) for s in range(3)]
        assert values == [{1.0}, {0.0, 2.0}, {0.0, 4.0}]
    assert not torch.equal(masks[0].coeff, masks[1].coeff)
    model.eval()(**inputs, adapter_names=names)
    assert masks[-1].coeff is None


def test_checks_of_training_batches_see_an_adapters_own_examples():
    """An adapter with a response template beside one that follows the labels."""
    model = build({"labels": reft(), "template": reft(rank=2, response_template=[5, 6])})
    inputs = inputs_for(["labels"] * 3, labels=True)
    inputs["input_ids"][2, 4:6] = torch.tensor([5, 6])
    names = ["labels", BASE, "template"]
    model.train()(**inputs, adapter_names=names).loss.backward()
    twice = inputs["labels"].clone()
    twice[1, :2] = 7  # the row of the base has two responses
    model(**{**inputs, "labels": twice}, adapter_names=names)
    with pytest.raises(ValueError, match="several supervised spans"):
        model(**{**inputs, "labels": twice}, adapter_names=["labels", "labels", "template"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["greedy", "beams", "chunks", "static"],
)
def test_generates_what_each_adapter_generates_alone(side, options):
    model, names = build(), ["c", "a", BASE, "b", "d"]
    mask = mask_of([24, 17, 10, 24, 12], side)
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    call = {"input_ids": ids, "attention_mask": mask, **GREEDY, **options}
    repeats = options.get("num_return_sequences", 1)
    mixed = model.generate(**call, adapter_names=names)
    for row, name in enumerate(names):
        want = alone(model, name, lambda: model.generate(**call))
        rows = slice(row * repeats, (row + 1) * repeats)
        assert torch.equal(mixed[rows], want[rows]), name


def test_encoder_decoder_models_and_beams():
    configs = {
        "e": reft(component="encoder.block_output"),
        "d": reft(rank=2, component="decoder.block_output"),
    }
    model, names = build(configs, "t5"), ["d", BASE, "e"]
    inputs = inputs_for(names, family="t5")
    mixed = model.generate(**inputs, adapter_names=names, num_beams=2, max_new_tokens=4)
    for row, name in enumerate(names):
        want = alone(model, name, lambda: model.generate(**inputs, num_beams=2, max_new_tokens=4))
        assert torch.equal(mixed[row], want[row])


def test_a_cache_of_other_adapters_is_noticed():
    model, names = build({"a": reft(), "b": reft(rank=2)}), ["a", "b"]
    inputs = inputs_for(names, "left")
    options = {**GREEDY, "return_dict_in_generate": True}
    first = model.generate(**inputs, adapter_names=names, **options)
    again = {
        "input_ids": first.sequences,
        "attention_mask": torch.cat(
            [inputs["attention_mask"], torch.ones(2, 4, dtype=torch.int64)], 1
        ),
        "past_key_values": first.past_key_values,
        "prompt_lengths": inputs["attention_mask"].sum(1),
    }
    with pytest.warns(UserWarning, match="adapter 'b' are not those"):
        model.generate(**again, adapter_names=["b", "a"], **GREEDY)


def test_refused():
    model = build({"a": reft(), "b": reft()})
    inputs = inputs_for("ab")
    packed = {**inputs, "position_ids": torch.arange(24).repeat(2, 1)}
    del packed["attention_mask"]
    with pytest.raises(ValueError, match="adapter_names: expected a padded batch of tokens"):
        model(**packed, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="adapter_names: got 3 names for a batch of 2"):
        model(**inputs, adapter_names=["a", "b", "a"])
    assert torch.isfinite(model(**inputs, adapter_names=["a", "b"]).logits).all()
