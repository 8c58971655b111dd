"""Trainer and TRL with states kept across steps: the losses are those without."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig, from_chat_template, keep_prefix_states
from tests.families.family import VERSION_5
from tests.integrations.test_peft_supervised_logits import trained, trainer
from tests.model.families import make, shake
from tests.tiny_chat import save_chat_model

MANY = 10**8


def tuned(**config):
    torch.manual_seed(0)
    config = {"positions": "l2", "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(make("llama"), ReftConfig(rank=4, **config))
    shake(model)
    return model


@pytest.mark.parametrize(
    ("edits", "settings"),
    [
        ({}, {}),
        ({}, {"gradient_accumulation_steps": 2}),
        ({"positions": "f2+l2", "layers": [1, 2]}, {"gradient_accumulation_steps": 2}),
        (
            {"positions": "f2+l2", "layers": [1, 2]},
            {
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
    ],
)
def test_training_is_the_same(tmp_path, edits, settings):
    plain, kept = tuned(**edits), tuned(**edits)
    first, plain_log = trainer(tmp_path, plain, **settings)
    first.train()
    second, kept_log = trainer(tmp_path, kept, **settings)
    with keep_prefix_states(kept, max_bytes=MANY) as states:
        if "gradient_checkpointing" in settings and not VERSION_5:
            with pytest.raises(ValueError, match="gradient checkpointing of transformers 4"):
                second.train()
            return
        second.train()
    assert len(kept_log.losses) == 4
    digits = 0.0 if VERSION_5 else 1.01e-4  # transformers 4 logs four digits
    assert kept_log.losses == pytest.approx(plain_log.losses, rel=1e-5, abs=digits)
    for ours, expected in zip(trained(kept), trained(plain), strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()
    rows = 4 * 3 * settings.get("gradient_accumulation_steps", 1)  # one epoch, or two
    assert states.statistics.found + states.statistics.computed == rows
    assert states.statistics.computed == 12  # as many as there are rows: each once
    assert states.statistics.plain_calls == 0


def test_evaluations_between_steps_run_as_they_are(tmp_path):
    plain, kept = tuned(positions="l2"), tuned(positions="l2")
    logs = []
    for model in (plain, kept):
        made, log = trainer(tmp_path, model, eval_strategy="steps", eval_steps=2)
        opened = keep_prefix_states(model, max_bytes=MANY) if model is kept else None
        made.train()
        logs.append([e["eval_loss"] for e in made.state.log_history if "eval_loss" in e])
        if opened is not None:
            assert opened.statistics.calls == 4
            opened.close()
    assert len(logs[0]) == 2 and logs[1] == pytest.approx(logs[0], rel=1e-4)


@pytest.mark.parametrize("own_methods", [False, True])
def test_mixed_precision(tmp_path, own_methods):
    """With transformers' ``add_adapter``, Trainer wraps the model that is opened in autocast."""
    losses = []
    for keep in (False, True):
        if own_methods:
            model = make("llama")
            model.add_adapter(ReftConfig(rank=4, positions="l2"), "reft")
            shake(model)
        else:
            model = tuned()
        made, log = trainer(tmp_path, model, bf16=True)
        with keep_prefix_states(model, max_bytes=MANY) if keep else contextlib.nullcontext() as s:
            made.train()
        if keep:
            assert s.statistics.calls == 4
        losses.append(log.losses)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_sft_trainer_of_trl_logs_the_same(tmp_path):
    trl = pytest.importorskip("trl", reason="needs the package trl")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder = str(save_chat_model(tmp_path / "base"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [[{"role": "user", "content": f"Name {n} fruits"}] for n in ("a few", "two", "some")]
    answer = [{"role": "assistant", "content": "An apple"}]
    rows = datasets.Dataset.from_list([{"prompt": p, "completion": answer} for p in asked])
    logs = []
    for keep in (False, True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
        )
        made = trl.SFTTrainer(
            folder,
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=ReftConfig(
                rank=2,
                positions="l2",
                task_type="CAUSAL_LM",
                response_template=from_chat_template(tokenizer),
            ),
        )
        opened = keep_prefix_states(made.model, max_bytes=MANY) if keep else None
        made.train()
        names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        logs.append([[e[n] for n in names] for e in made.state.log_history if "loss" in e])
    assert opened is not None
    assert (opened.statistics.calls, opened.statistics.computed) == (4, 3)
    opened.close()
    assert len(logs[0]) == 4
    for plain, kept in zip(*logs, strict=True):
        assert kept == pytest.approx(plain, rel=1e-4)
