"""transformers' Trainer: training, saving, resuming, and errors for removed columns."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import VOCAB, batch, make, stacks


class Texts(torch.utils.data.Dataset):
    """Examples with 9 prompt tokens and 5 response tokens."""

    def __init__(self, count: int = 16, **extra):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, VOCAB, (count, 14), generator=generator)
        self.extra = extra

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        labels = self.ids[index].clone()
        labels[:9] = -100
        return {
            "input_ids": self.ids[index],
            "attention_mask": torch.ones(14, dtype=torch.int64),
            "labels": labels,
            **self.extra,
        }


def trainer(folder, steps=4, model=None, dataset=None, **kwargs):
    torch.manual_seed(0)
    model = model or get_peft_model(
        make("llama"), ReftConfig(rank=4, dropout=0.1, task_type="CAUSAL_LM")
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        save_steps=2,
        logging_steps=1,
        seed=3,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        **kwargs,
    )
    return transformers.Trainer(model, arguments, train_dataset=dataset or Texts())


def parameters(model):
    return [p.detach().clone() for p in stacks(model)[0].parameters()]


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_trains_saves_and_resumes_to_the_same_parameters(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and (
        checkpoint / "adapter_config.json"
    ).exists()
    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert all(
        torch.equal(a, b)
        for a, b in zip(parameters(whole.model), parameters(resumed.model), strict=True)
    )
    loaded = PeftModel.from_pretrained(make("llama"), tmp_path / "whole" / "checkpoint-4")
    inputs = batch("llama")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, whole.model.eval()(**inputs).logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_through_the_trainer(tmp_path, reentrant):
    plain = trainer(tmp_path / "plain", steps=2)
    plain.train()
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), ReftConfig(rank=4, dropout=0.1, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpointed = trainer(tmp_path / "checkpointed", steps=2, model=model, **options)
        checkpointed.train()
    torch.testing.assert_close(losses(checkpointed), losses(plain))


def test_labels_that_do_not_arrive_are_refused_in_training_and_noticed_once_in_evaluation(tmp_path):
    model = get_peft_model(make("llama"), ReftConfig(rank=4, task_type="CAUSAL_LM")).train()
    inputs = batch("llama")
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match="neither labels nor prompt_lengths"):
        model(**inputs)
    model.eval()
    with pytest.warns(UserWarning, match="does not tell where prompts end"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
    model = get_peft_model(make("llama"), ReftConfig(rank=4, task_type="CAUSAL_LM")).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        given = model(**inputs, prompt_lengths=[18, 9, 4]).logits
        model(**inputs, labels=labels)
        assert torch.equal(given, model(**inputs, labels=labels).logits)
        get_peft_model(make("bert"), ReftConfig(rank=4)).train()(
            **{k: v for k, v in batch("bert").items() if k != "labels"}
        )


def test_prompt_lengths_as_a_column_of_the_data(tmp_path):
    """With remove_unused_columns=False, prompt_lengths of a collator are used and not passed on."""
    data = Texts(prompt_lengths=9)
    run = trainer(
        tmp_path / "column",
        dataset=data,
        remove_unused_columns=False,
        label_smoothing_factor=0.1,
        steps=2,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run.train()
    assert len(losses(run)) == 2
