"""Classifiers that read the mean of the last hidden states."""

from __future__ import annotations

import pytest
import torch
from reft_train import tasks
from reft_train.config import build
from reft_train.errors import UserError
from reft_train.methods import load_adapter
from reft_train.models import MeanPooledClassifier, load
from transformers import AutoModel

from tests.reft_train.runs import boolq, write_rows


def _settings(folder, **values):
    return build(
        {
            "model": str(folder),
            "task": "boolq",
            "architecture": "encoder",
            "pooling": "mean",
            "positions": "all",
        }
        | values
    )


def _inputs():
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([1, 0])}


def test_padding_does_not_count(tiny_bert):
    model = load(_settings(tiny_bert), tasks.get("boolq")).model.eval()
    inputs = _inputs()
    short = {
        "input_ids": inputs["input_ids"][1:, :3],
        "attention_mask": inputs["attention_mask"][1:, :3],
    }
    torch.testing.assert_close(model(**inputs).logits[1:], model(**short).logits)


def test_loss_is_that_of_the_logits(tiny_bert):
    inputs = _inputs()
    model = load(_settings(tiny_bert), tasks.get("boolq")).model
    found = model.eval()(**inputs)
    assert torch.equal(
        found.loss, torch.nn.functional.cross_entropy(found.logits, inputs["labels"])
    )


def test_numbers_to_predict_have_the_squared_error(tiny_bert):
    model = load(_settings(tiny_bert, task="glue/stsb"), tasks.get("glue/stsb")).model.eval()
    inputs = _inputs() | {"labels": torch.tensor([4.0, 1.5])}
    found = model(**inputs)
    assert found.logits.shape == (2, 1)
    assert torch.equal(
        found.loss, torch.nn.functional.mse_loss(found.logits.squeeze(-1), inputs["labels"])
    )


def test_the_head_alone_is_new_and_drawn_from_the_seed(tiny_bert):
    first, again, other = (
        load(_settings(tiny_bert, seed=seed), tasks.get("boolq")) for seed in (1, 1, 2)
    )
    assert first.heads == ["classifier"] and isinstance(first.model, MeanPooledClassifier)
    assert torch.equal(first.model.classifier.weight, again.model.classifier.weight)
    assert not torch.equal(first.model.classifier.weight, other.model.classifier.weight)
    plain = AutoModel.from_pretrained(tiny_bert)
    assert torch.equal(
        first.model.encoder.get_input_embeddings().weight, plain.get_input_embeddings().weight
    )


def test_a_run_trains_and_its_adapter_reloads_to_the_same_logits(tiny_bert, tmp_path):
    write_rows(tmp_path / "rows.json", boolq(24))
    config = _settings(
        tiny_bert,
        train=str(tmp_path / "rows.json"),
        test=[str(tmp_path / "rows.json")],
        output=str(tmp_path / "run"),
        rank=2,
        epochs=2,
        batch_size=4,
        accumulation=1,
        gradient_checkpointing=True,
        cache=str(tmp_path / "cache"),
    )
    from reft_train.training.session import train

    outcome = train(config)
    assert outcome.head == 2 * 32 + 2 and outcome.trainable > 0
    models = [
        load_adapter(
            load(config.replace(seed=seed), tasks.get("boolq")), tmp_path / "run" / "adapter"
        )
        for seed in (1, 2)
    ]
    inputs = _inputs()
    first, second = (model.eval()(**inputs).logits for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, load(config, tasks.get("boolq")).model.eval()(**inputs).logits)


def test_a_model_that_generates_is_refused(tiny_llama):
    with pytest.raises(UserError, match="pooling: got 'mean' with a causal model"):
        load(
            build({"model": str(tiny_llama), "task": "boolq", "pooling": "mean"}),
            tasks.get("boolq"),
        )
