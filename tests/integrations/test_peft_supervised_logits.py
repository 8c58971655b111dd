"""Trainer with the logits of supervised tokens only: losses, gradients and evaluations."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from peft import get_peft_model

from reft_kernels.integrations.peft import (
    ReftConfig,
    from_chat_template,
    keep_supervised_logits,
    share_build,
)
from tests.model.families import VOCAB, make, shake
from tests.tiny_chat import save_chat_model


class Answers(torch.utils.data.Dataset):
    """Padded examples whose prompts and answers have different lengths."""

    def __init__(self, count: int = 12):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for _ in range(count):
            prompt, answer = torch.randint(2, 9, (2,), generator=generator).tolist()
            ids = torch.randint(3, VOCAB, (18,), generator=generator)
            mask = (torch.arange(18) < prompt + answer).long()
            labels = ids.masked_fill((torch.arange(18) < prompt) | (mask == 0), -100)
            self.rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Recorder(transformers.TrainerCallback):
    """The losses of all steps."""

    def __init__(self):
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def tuned(**config):
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), ReftConfig(rank=4, task_type="CAUSAL_LM", **config))
    shake(model)
    return model


def trainer(folder, model, **kwargs):
    metrics = kwargs.pop("compute_metrics", None)
    recorder = Recorder()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **kwargs,
    )
    made = transformers.Trainer(
        model,
        arguments,
        train_dataset=Answers(),
        eval_dataset=Answers(6),
        compute_metrics=metrics,
        callbacks=[recorder],
    )
    return made, recorder


def trained(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def heads(model) -> list[int]:
    """Number of tokens that enter the output layer in each call; grows as calls are made."""
    counts: list[int] = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape[:-1].numel())
    )
    return counts


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_the_same(tmp_path, accumulation):
    plain, kept = tuned(), tuned()
    first, plain_log = trainer(tmp_path, plain, gradient_accumulation_steps=accumulation)
    first.train()
    second, kept_log = trainer(tmp_path, kept, gradient_accumulation_steps=accumulation)
    counts = heads(kept)
    with keep_supervised_logits(kept):
        second.train()
    assert len(counts) == 4 * accumulation and max(counts) < 3 * 18 / 2
    assert len(kept_log.losses) == 4
    assert kept_log.losses == pytest.approx(plain_log.losses, rel=1e-5)
    for ours, expected in zip(trained(kept), trained(plain), strict=True):
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_with_one_build_for_several_forwards(tmp_path):
    plain, kept = tuned(), tuned()
    first, plain_log = trainer(tmp_path, plain, gradient_accumulation_steps=2)
    first.train()
    second, kept_log = trainer(tmp_path, kept, gradient_accumulation_steps=2)
    step = second.training_step
    with keep_supervised_logits(kept), share_build(kept) as shared:

        def training_step(*args, **kwargs):
            loss = step(*args, **kwargs)
            if second.accelerator.gradient_state.sync_gradients:
                shared.flush()
            return loss

        second.training_step = training_step
        second.train()
    assert kept_log.losses == pytest.approx(plain_log.losses, rel=1e-5)


def test_evaluations_read_the_logits_of_all_tokens(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {"count": len(prediction.predictions)}

    model = tuned()
    plain, _ = trainer(tmp_path, model, compute_metrics=metrics)
    plain.evaluate()
    with keep_supervised_logits(model):
        plain.evaluate()
    before, during = seen
    assert before.shape == (6, 18, VOCAB)
    assert (before == during).all()


def test_evaluation_between_training_steps(tmp_path):
    seen = []
    model = tuned()
    made, _ = trainer(
        tmp_path,
        model,
        eval_strategy="steps",
        eval_steps=2,
        compute_metrics=lambda p: seen.append(p.predictions.shape) or {},
    )
    with keep_supervised_logits(model):
        made.train()
    assert seen == [(6, 18, VOCAB)] * 2


def test_label_smoothing_reads_all_logits(tmp_path):
    """Trainer then computes the loss from the logits, and gives the model no labels."""
    plain, kept = tuned(positions="all"), tuned(positions="all")  # no labels show the prompt
    first, plain_log = trainer(tmp_path, plain, label_smoothing_factor=0.1)
    first.train()
    second, kept_log = trainer(tmp_path, kept, label_smoothing_factor=0.1)
    counts = heads(kept)
    with keep_supervised_logits(kept):
        second.train()
    assert counts == [3 * 18] * 4
    assert kept_log.losses == plain_log.losses


def test_mixed_precision(tmp_path):
    plain, kept = tuned(), tuned()
    first, plain_log = trainer(tmp_path, plain, bf16=True)
    first.train()
    second, kept_log = trainer(tmp_path, kept, bf16=True)
    with keep_supervised_logits(kept):
        second.train()
    assert kept_log.losses == pytest.approx(plain_log.losses, rel=1e-3)


def test_a_model_with_its_own_adapter_methods(tmp_path):
    """``add_adapter`` of transformers: the model that Trainer wraps is the one that is opened."""
    losses = []
    for keep in (False, True):
        torch.manual_seed(0)
        model = make("llama")
        model.add_adapter(ReftConfig(rank=4), "reft")
        shake(model)
        made, log = trainer(tmp_path, model, bf16=True)
        counts = heads(model)
        if keep:
            with keep_supervised_logits(model):
                made.train()
            assert max(counts) < 3 * 18 / 2
        else:
            made.train()
        losses.append(log.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_sft_trainer_of_trl_logs_the_same(tmp_path):
    """TRL's loss, entropy and accuracy of labelled tokens do not depend on the switch."""
    trl = pytest.importorskip("trl", reason="needs the package trl")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder = str(save_chat_model(tmp_path / "base"))
    chat = [("user", "Name a fruit"), ("assistant", "An apple")]
    messages = [{"role": role, "content": content} for role, content in chat]
    rows = datasets.Dataset.from_list([{"prompt": messages[:1], "completion": messages[1:]}] * 4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    logs = []
    for keep in (False, True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=3,
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
                rank=2, task_type="CAUSAL_LM", response_template=from_chat_template(tokenizer)
            ),
        )
        with keep_supervised_logits(made.model) if keep else contextlib.nullcontext():
            made.train()
        names = ("loss", "entropy", "mean_token_accuracy")
        logs.append([[e[n] for n in names] for e in made.state.log_history if "loss" in e])
    assert len(logs[0]) == 3
    for plain, kept in zip(*logs, strict=True):
        assert kept == pytest.approx(plain, rel=1e-4)
