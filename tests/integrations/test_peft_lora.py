"""LoRA and other PEFT methods together with ReFT: training, saving, generation and errors."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file

from reft_kernels.integrations.peft import ReftConfig
from tests.integrations.test_peft_trainer import Texts, trainer
from tests.model.families import batch, hook_count, make, plain_hooks, prompt_columns, shake, stacks

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]

ALPHA, R = 32, 4


def lora(**kwargs) -> LoraConfig:
    options = {"r": R, "lora_alpha": ALPHA, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**options, **kwargs})


def reft(**kwargs) -> ReftConfig:
    return ReftConfig(**{"rank": 4, "positions": "l1", "task_type": "CAUSAL_LM", **kwargs})


def nested():
    return get_peft_model(get_peft_model(make("llama"), lora()), reft(), adapter_name="reft")


def on_the_lora_model():
    inner = get_peft_model(make("llama"), lora())
    return get_peft_model(inner.base_model.model, reft(), adapter_name="reft")


def mixin():
    model = make("llama")
    model.add_adapter(lora(), "default")
    model.add_adapter(reft(), "reft")
    model.set_adapter(["default", "reft"])
    return model


WAYS = [nested, on_the_lora_model, mixin]


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def of_lora(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def of_reft(model) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".reft_stack." in n}


@contextlib.contextmanager
def oracle(model, columns):
    """The base model with LoRA merged manually and, with ``columns``, ReFT by temporary hooks."""
    plain = make("llama")
    weights = of_lora(model)
    with torch.no_grad():
        for layer, block in enumerate(plain.model.layers):
            (a,) = [p for n, p in weights.items() if f"layers.{layer}." in n and ".lora_A." in n]
            (b,) = [p for n, p in weights.items() if f"layers.{layer}." in n and ".lora_B." in n]
            block.self_attn.o_proj.weight += (ALPHA / R) * b @ a
    (stack,) = stacks(model)
    with plain_hooks(
        "llama", plain, lambda _: columns, lambda i: (stack.R[i], stack.W[i], stack.b[i])
    ):
        yield plain


@pytest.fixture
def inputs():
    return batch("llama")


@pytest.fixture
def columns(inputs):
    return prompt_columns("llama", inputs, 0, 1, inputs["input_ids"].shape[1])


@pytest.mark.parametrize("way", WAYS)
def test_both_train_and_the_logits_are_those_of_both(way, inputs, columns):
    model = way().train()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(of_lora(model)) | set(of_reft(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {n: p.detach().clone() for n, p in {**of_lora(model), **of_reft(model)}.items()}
    losses = []
    for _ in range(3):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    moved = {n for n, p in model.named_parameters() if n in start and not torch.equal(p, start[n])}
    assert any("lora_A" in n for n in moved) and any("lora_B" in n for n in moved)
    assert any("reft_stack" in n for n in moved)
    shake(model)
    with oracle(model, columns) as plain:
        expected = logits(plain, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    with oracle(model, None) as plain:  # the edit must change the logits
        assert (logits(plain, inputs) - expected).abs().max() > 0.05


@pytest.mark.parametrize("way", WAYS)
def test_generates_what_both_together_generate(way, inputs):
    model = way()
    shake(model)
    prompt = inputs["input_ids"][:1, :8]
    got = model.eval().generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    with oracle(model, [[7]]) as plain, torch.no_grad():
        expected = prompt
        for _ in range(6):
            step = plain(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, step], dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("way", [nested, on_the_lora_model])
def test_one_save_holds_both_and_loads_on_the_base_model(way, inputs, tmp_path):
    model = way()
    shake(model)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert all(
        k.startswith("base_model.model.model.layers.")
        for k in load_file(tmp_path / "adapter_model.safetensors")
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(make("llama"), tmp_path)
        loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    assert torch.equal(logits(loaded, inputs), expected)
    assert not any(p.requires_grad for p in loaded.parameters())
    other = make("llama")  # the same folders through transformers
    other.load_adapter(tmp_path, adapter_name="default")
    other.load_adapter(tmp_path / "reft", adapter_name="reft")
    other.set_adapter(["default", "reft"])
    assert torch.equal(logits(other, inputs), expected)


def test_loading_for_training_trains_both(inputs, tmp_path):
    nested().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    model = PeftModel.from_pretrained(
        model, tmp_path / "reft", adapter_name="reft", is_trainable=True
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *of_lora(model),
        *of_reft(model),
    }


def test_a_frozen_lora_stays_frozen(inputs, tmp_path):
    get_peft_model(make("llama"), lora()).save_pretrained(tmp_path)
    model = get_peft_model(
        PeftModel.from_pretrained(make("llama"), tmp_path), reft(), adapter_name="reft"
    )
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(of_reft(model))


def test_transformers_saves_one_after_the_other(inputs, tmp_path):
    model = mixin()
    shake(model)
    expected = logits(model, inputs)
    with pytest.raises(ValueError, match="save adapters separately one by one"):
        model.save_pretrained(tmp_path / "both")
    for name in ("default", "reft"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "default")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    assert torch.equal(logits(loaded, inputs), expected)


def test_transformers_takes_them_in_either_order(inputs):
    one, other = mixin(), make("llama")
    other.add_adapter(reft(), "reft")
    other.add_adapter(lora(), "default")
    other.set_adapter(["default", "reft"])
    shake(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(logits(other, inputs), logits(one, inputs))


VERA = VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
ADALORA = AdaLoraConfig(
    target_modules=["o_proj"], task_type="CAUSAL_LM", total_step=9, tinit=1, tfinal=1
)
PREFIX = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
ACTIVATED = lora(alora_invocation_tokens=[5, 6])
HEAD = lora(modules_to_save=["lm_head"])
REFUSED = {
    "same name": (
        lora(),
        lambda m: get_peft_model(m, reft()),
        "'default' is already .*LORA.*adapter_name='reft'",
    ),
    "same name, on the model": (
        lora(),
        lambda m: get_peft_model(m.base_model.model, reft()),
        "adapter_name='reft'",
    ),
    "add_adapter": (
        lora(),
        lambda m: m.add_adapter("reft", reft()),
        "Cannot combine .*LORA and PeftType.REFT",
    ),
    "LoRA around ReFT": (
        reft(),
        lambda m: get_peft_model(m, lora(), adapter_name="lora"),
        "attach LoRA first",
    ),
    "LoRA for ReFT": (reft(), lambda m: get_peft_model(m, lora()), "attach LoRA first"),
    "LoRA on the ReFT model": (
        reft(),
        lambda m: get_peft_model(m.base_model.model, lora(), adapter_name="lora"),
        "attach LoRA first",
    ),
    "prefix tuning": (
        PREFIX,
        lambda m: get_peft_model(m, reft(), adapter_name="reft"),
        "positions do not count",
    ),
    "VeRA": (VERA, lambda m: get_peft_model(m, reft(), adapter_name="reft"), "outside the layers"),
    "AdaLoRA": (
        ADALORA,
        lambda m: get_peft_model(m, reft(), adapter_name="reft"),
        "changes the model's forward",
    ),
    "activated LoRA": (
        ACTIVATED,
        lambda m: get_peft_model(m, reft(), adapter_name="reft"),
        "invocation tokens",
    ),
    "the same head": (
        HEAD,
        lambda m: get_peft_model(m, reft(modules_to_save=["lm_head"]), adapter_name="reft"),
        "only one adapter",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_weights_is_refused_and_changes_nothing(case, inputs, tmp_path):
    config, attach, message = REFUSED[case]
    model = get_peft_model(make("llama"), config)
    shake(model)
    before, hooks, names = logits(model, inputs), hook_count(model), list(model.peft_config)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert list(model.peft_config) == names and hook_count(model) == hooks
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert torch.equal(logits(model, inputs), before)
    model.save_pretrained(tmp_path)
    if config not in (PREFIX, ADALORA):  # PEFT cannot load these for the comparison
        assert torch.equal(
            logits(PeftModel.from_pretrained(make("llama"), tmp_path), inputs), before
        )


@pytest.mark.parametrize("wrapped", [False, True])
def test_another_adapter_takes_the_place_of_one_of_its_name(wrapped, inputs, tmp_path):
    expected = []
    for i, config in enumerate([reft(), reft(rank=2, layers=[1], positions="f1+l1")]):
        model = get_peft_model(make("llama"), config)
        shake(model, seed=i)
        expected.append(logits(model, inputs))
        model.save_pretrained(tmp_path / str(i))
    model = base = make("llama")
    for i in (0, 1, 0):
        model = PeftModel.from_pretrained(model if wrapped else base, tmp_path / str(i))
        assert torch.equal(logits(model, inputs), expected[i])


@pytest.mark.parametrize("config", [lora(), reft()])
def test_a_mixed_model_says_what_it_takes(config):
    with pytest.raises(ValueError, match="'REFT' is not compatible with the `PeftMixedModel`"):
        model = get_peft_model(make("llama"), config, mixed=True)
        model.add_adapter("reft", reft())


def test_a_mixed_model_can_be_underneath(inputs, tmp_path):
    mixed = get_peft_model(make("llama"), lora(), mixed=True)
    model = get_peft_model(mixed, reft(), adapter_name="reft")
    shake(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_two_reft_adapters_take_turns_over_one_lora(inputs, tmp_path):
    model = nested()
    model.add_adapter("second", reft(rank=2))
    assert model.active_adapters == ["reft", "default"]
    model.base_model.set_adapter(["reft", "second"])
    shake(model)
    model.set_adapter("reft")
    one = logits(model, inputs)
    model.set_adapter("second")
    two = logits(model, inputs)
    assert model.active_adapters == ["second", "default"] and not torch.equal(one, two)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*of_lora(model), *(n for n in of_reft(model) if ".second." in n)}
    model.set_adapter("default")  # an adapter of LoRA: the active ReFT adapter does not change
    assert torch.equal(logits(model, inputs), two)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits(loaded, inputs), one)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded, inputs), two)
    with pytest.raises(ValueError, match="Adapter third not found"):
        model.set_adapter("third")


def test_each_can_be_deleted(inputs):
    model = nested()
    shake(model)
    with oracle(model, None) as plain:
        lora_alone = logits(plain, inputs)
    model.delete_adapter("reft")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    torch.testing.assert_close(logits(model, inputs), lora_alone)
    assert not of_reft(model)

    model = nested()
    shake(model)
    alone = get_peft_model(make("llama"), reft())
    stacks(alone)[0].load_state_dict(stacks(model)[0].state_dict())
    model.delete_adapter("default")
    assert list(model.peft_config) == model.active_adapters == ["reft"]
    torch.testing.assert_close(logits(model, inputs), logits(alone, inputs))


@pytest.mark.parametrize("way", [nested, on_the_lora_model])
def test_disabled_and_unloaded_it_is_the_base_model(way, inputs):
    model = way()
    shake(model)
    base, both = logits(make("llama"), inputs), logits(model, inputs)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), base)
    assert torch.equal(logits(model, inputs), both)
    plain = model.unload()
    assert torch.equal(logits(plain, inputs), base) and hook_count(plain) == 0


def test_lora_merges_under_reft_and_is_saved_with_the_base_model(inputs, tmp_path):
    inner = get_peft_model(make("llama"), lora())
    model = get_peft_model(inner, reft(), adapter_name="reft")
    shake(model)
    both = logits(model, inputs)
    merged = inner.merge_and_unload()
    assert not of_lora(model)
    torch.testing.assert_close(logits(model, inputs), both)
    with pytest.raises(
        ValueError, match="'default' has no weights .* after merge_and_unload; call delete_adapter"
    ):
        model.save_pretrained(tmp_path / "lost")
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    model.unload()
    loaded = PeftModel.from_pretrained(merged, tmp_path / "reft", adapter_name="reft")
    torch.testing.assert_close(logits(loaded, inputs), both)


def test_merging_both_is_refused_and_lora_alone_merges(inputs):
    model = nested()
    shake(model)
    both = logits(model, inputs)
    with pytest.raises(ValueError, match="chosen positions"):
        model.merge_and_unload()
    assert torch.equal(logits(model, inputs), both)
    with oracle(model, None) as plain:
        expected = logits(plain, inputs)
    merged = model.merge_and_unload(adapter_names=["default"])
    torch.testing.assert_close(logits(merged, inputs), expected)


def test_the_head_that_lora_trains_stays_its_own(inputs, tmp_path):
    inner = get_peft_model(make("llama"), lora(modules_to_save=["lm_head"]))
    shake(inner)
    alone = logits(inner, inputs)
    model = get_peft_model(inner, reft(), adapter_name="reft")
    # ReFT is the identity at initialization, and the head is still active
    assert torch.equal(logits(model, inputs), alone)
    assert any(p.requires_grad for n, p in model.named_parameters() if "lm_head" in n)
    shake(model)
    both = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    assert torch.equal(logits(loaded, inputs), both)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        LoHaConfig(target_modules=["o_proj"], r=2, task_type="CAUSAL_LM"),
        LoKrConfig(target_modules=["o_proj"], r=2, task_type="CAUSAL_LM"),
        OFTConfig(target_modules=["o_proj"], oft_block_size=8, task_type="CAUSAL_LM"),
        lora(use_dora=True),
    ],
    ids=["IA3", "LoHa", "LoKr", "OFT", "DoRA"],
)
def test_other_methods_are_combined_as_lora_is(config, inputs, tmp_path):
    model = get_peft_model(get_peft_model(make("llama"), config), reft(), adapter_name="reft")
    shake(model)
    both = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert not torch.equal(logits(loaded, inputs), both)
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "reft", adapter_name="reft")
    torch.testing.assert_close(logits(loaded, inputs), both)


def test_a_batch_of_several_tasks_is_refused(inputs):
    with pytest.raises(
        ValueError, match="adapter_names: not supported for a model with adapters of another method"
    ):
        nested().eval()(**inputs, adapter_names=["default", "reft", "__base__"])


@pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5,
    reason=(
        "the Trainer of transformers 4 resumes the adapters in a checkpoint's subfolders alone, "
        "and not LoRA's own folder"
    ),
)
def test_trainer_resumes_both(tmp_path):
    whole = trainer(tmp_path / "whole", model=nested(), dataset=Texts())
    whole.train()
    resumed = trainer(tmp_path / "resumed", model=nested(), dataset=Texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    trained = dict(resumed.model.named_parameters())
    for name, parameter in {**of_lora(whole.model), **of_reft(whole.model)}.items():
        torch.testing.assert_close(trained[name], parameter, msg=name)


def test_trainer_does_not_load_half_of_the_best_model(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    run = transformers.Trainer(nested(), arguments, train_dataset=Texts(), eval_dataset=Texts())
    with pytest.raises(ValueError, match="adapter 'reft': the file lacks"):
        run.train()
