"""Several adapters on one model, adapter methods of transformers, loading errors, merging."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, hook_count, make, shake, stacks

CONTAINER = "representation_edits"


def first(**kwargs) -> ReftConfig:
    return ReftConfig(**{"rank": 4, **kwargs})


def second(**kwargs) -> ReftConfig:
    return ReftConfig(
        **{
            "rank": 2,
            "layers": [1],
            "positions": "l1",
            "intervention": "nodireft",
            "init": "orthogonal",
            **kwargs,
        }
    )


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def build(config=None, family="llama", seed=7):
    model = get_peft_model(make(family), config or first())
    shake(model, seed=seed)
    return model.eval()


@pytest.fixture
def inputs():
    return batch("llama")


def test_two_adapters_take_turns(inputs, tmp_path):
    one, other = build(), build(second(), seed=8)
    expected = {"one": logits(one, inputs), "other": logits(other, inputs)}
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    model = PeftModel.from_pretrained(make("llama"), tmp_path / "one", adapter_name="one")
    count = hook_count(model)
    model.load_adapter(tmp_path / "other", adapter_name="other")
    assert hook_count(model) == count  # both adapters edit the same modules
    for name in ("one", "other", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model, inputs), expected[name])
    model.base_model.set_adapter(["one", "other"])
    assert not any(torch.equal(logits(model, inputs), e) for e in expected.values())
    model.set_adapter("one")
    with pytest.warns(UserWarning, match="'other' is active now"):
        model.delete_adapter("one")
    assert torch.equal(logits(model, inputs), expected["other"])
    model.delete_adapter("other")
    assert torch.equal(logits(model.base_model.model, inputs), logits(make("llama"), inputs))
    assert hook_count(model) == 0 and not any(
        CONTAINER in name for name, _ in model.named_modules()
    )


def test_only_the_active_adapter_trains(inputs):
    model = build()
    model.add_adapter("other", second())
    model.set_adapter("other")
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".other." in n for n in trainable)
    model.train()(**inputs).loss.backward()
    assert all((p.grad is not None) == (".other." in n) for n, p in model.named_parameters())


def test_trainable_parameters_are_counted(capsys):
    build().print_trainable_parameters()
    assert "trainable params: 780" in capsys.readouterr().out  # 3 layers of 2 d r + r


def test_adapters_of_several_tasks_in_one_batch(inputs):
    model = build()
    model.add_adapter("other", second(positions="prompt"))
    with torch.no_grad():
        for parameter in stacks(model)[1].parameters():
            parameter.add_(0.2)
    single = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        single[name] = logits(model, inputs)
    single["__base__"] = logits(make("llama"), inputs)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], single[name][row])
        assert torch.equal(model(**inputs).logits, single["other"])
        prompts = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        model.generate(
            **prompts, adapter_names=names, max_new_tokens=2, num_beams=2, pad_token_id=0
        )
    with pytest.raises(ValueError, match=r"adapter_names: got \['no_such'\]"):
        model(**inputs, adapter_names=["no_such"] * 3)
    with pytest.raises(ValueError, match="adapter_names: got 2 names for a batch of 3"):
        model(**inputs, adapter_names=["default"] * 2)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    inputs = batch("bert")
    model = get_peft_model(make("bert"), first(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    shake(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in names) and all(
        "classifier" in n or CONTAINER in n for n in names
    )
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("bert", seed=0), tmp_path)
    assert torch.equal(logits(again, inputs), logits(model.eval(), inputs))


def test_low_memory_loading(inputs, tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("parametrization", ["householder", "cayley"])
@pytest.mark.parametrize(
    "name", ["loreft", "direft", "nodireft", "noreft", "consreft", "lobireft", "red"]
)
def test_every_member_trains_saves_and_loads(name, parametrization, inputs, tmp_path):
    model = build(first(intervention=name, init=None, parametrization=parametrization)).train()
    model(**inputs).loss.backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad
    )
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(
        logits(PeftModel.from_pretrained(make("llama"), tmp_path), inputs), logits(model, inputs)
    )


# ---- adapter methods of transformers


def test_transformers_adds_switches_and_deletes(inputs):
    model, frozen = make("llama"), logits(make("llama"), inputs)
    model.add_adapter(first(), adapter_name="one")
    shake(model)
    edited = logits(model, inputs)
    assert not torch.equal(edited, frozen)
    model.disable_adapters()
    assert torch.equal(logits(model, inputs), frozen)
    model.enable_adapters()
    assert torch.equal(logits(model, inputs), edited)
    model.add_adapter(second(), adapter_name="other")
    model.set_adapter("one")
    assert torch.equal(logits(model, inputs), edited)
    model.delete_adapter("one")
    model.delete_adapter("other")
    assert hook_count(model) == 0
    assert torch.equal(logits(model, inputs), frozen)


def test_transformers_loads_what_peft_saved(inputs, tmp_path):
    trained = build()
    trained.save_pretrained(tmp_path)
    model = make("llama")
    model.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(logits(model, inputs), logits(trained, inputs))


# ---- loading errors


def spoil(folder, change):
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


def _drop(state):
    del state[next(k for k in state if k.endswith(".W"))]


def _add(state):
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 2)


def _cut(state):
    key = next(k for k in state if k.endswith(".W"))
    state[key] = state[key][:, :2].contiguous()


BROKEN = {
    "missing": (_drop, r"lacks \['.*\.W'\]"),
    "foreign": (_add, r"foreign keys \['.*lora_A"),
    "rank": (_cut, r"W is \(3, 2, 32\), expected \(3, 4, 32\)"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_another"])
def test_a_file_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(
    case, beside, inputs, tmp_path
):
    change, message = BROKEN[case]
    build().save_pretrained(tmp_path)
    spoil(tmp_path, change)
    plain = make("llama")
    model = get_peft_model(plain, second()) if beside else plain
    model.eval()
    before = logits(model, inputs)
    keys, count = set(model.state_dict()), hook_count(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        if beside:
            model.load_adapter(tmp_path, adapter_name="new")
        else:
            PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model, inputs), before)
    assert set(model.state_dict()) == keys and hook_count(model) == count
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable
    assert list(getattr(model, "peft_config", {})) == (["default"] if beside else [])


def test_weights_that_do_not_fit_leave_an_adapter_that_was_there(inputs):
    model = build()
    before, state = logits(model, inputs), get_peft_model_state_dict(model)
    _cut(state)
    with pytest.raises(ValueError, match="rank, layers or width differ"):
        set_peft_model_state_dict(model, state)
    assert torch.equal(logits(model, inputs), before)


def test_a_configuration_that_says_another_rank_than_its_file(tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank": 5}))
    with pytest.raises(ValueError, match="rank, layers or width differ"):
        PeftModel.from_pretrained(make("llama"), tmp_path)


# ---- merging


LINEAR = {"llama": "model.layers.{layer}.mlp.down_proj", "gpt2": "transformer.h.{layer}.mlp.c_proj"}


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("name", ["loreft", "nodireft", "lobireft", "red"])
def test_an_edit_of_a_linear_layers_output_at_all_positions_merges(family, name):
    inputs = batch(family)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    model = build(
        first(component=LINEAR[family], positions="all", intervention=name, init=None), family
    )
    edited, frozen = logits(model, inputs), logits(make(family), inputs)
    merged = model.merge_and_unload(safe_merge=True)
    assert hook_count(merged) == 0 and not any(CONTAINER in n for n, _ in merged.named_modules())
    assert not torch.allclose(edited, frozen)
    # merging rounds the weight to fp32 once, about as much as the rounding of one layer
    torch.testing.assert_close(logits(merged, inputs), edited)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "edits chosen positions"),
        ({"positions": "all"}, "whole residual stream"),
        (
            {
                "positions": "all",
                "component": LINEAR["llama"],
                "activation": "relu",
                "init": "orthogonal",
            },
            "not linear",
        ),
        ({"positions": "all", "component": LINEAR["llama"] + ".input"}, "edits the input"),
    ],
)
def test_what_does_not_merge_exactly_says_why_and_stays(config, reason, inputs):
    model = build(first(**config))
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=reason):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.merge_adapter()
    assert torch.equal(logits(model, inputs), before)


def test_wrapping_again_after_unload_warns_of_nothing(inputs):
    bare = build().unload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(bare, first())
    assert torch.equal(logits(model, inputs), logits(make("llama"), inputs))
