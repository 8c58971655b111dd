"""The score of a model on one set of rows, and what it said to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reft_train.config import RunConfig
from reft_train.data.collating import ClassificationCollator
from reft_train.data.tokenizing import classification, pad_id
from reft_train.errors import UserError
from reft_train.evaluation.batching import evaluating, run_batches
from reft_train.evaluation.generating import Decode, context_window, encode_prompts, generate
from reft_train.models import CLASSIFICATION, Loaded
from reft_train.tasks.base import Row, Task


@dataclass(frozen=True)
class SetScore:
    """Metrics of a set by name (fractions and correlations, the task's main one first), and its
    rows with their predictions.

    A task that is not scored here, such as ``instruct``, has no metrics.
    """

    name: str
    metrics: dict[str, float]
    count: int
    predictions: list[dict[str, Any]] = field(repr=False)


def score_set(
    name: str,
    rows: Sequence[Row],
    loaded: Loaded,
    task: Task,
    config: RunConfig,
    *,
    progress: bool = True,
) -> SetScore:
    """Score a model on rows; neither their order nor the batch size matters to greedy answers and
    to classes.

    Args:
        name: of the set. loaded: the model, adapted or not; it stays where it is and keeps its
            training mode.
        config: batch size, lengths and decoding.

    Returns:
        The score. A prediction repeats its row's fields and adds ``index``, ``prediction`` and
        ``answer``, where answers are generated ``generated`` and ``right`` (None where the task has
        no rule), and where there are classes ``probabilities`` by label.

    Raises:
        UserError: no rows, a row that the task refuses, memory that does not suffice, or a model
            whose output is not finite.
    """
    if not rows:
        raise UserError(f"test set {name}: got no rows, expected at least one")
    score = _classes if loaded.kind == CLASSIFICATION else _answers
    return score(name, rows, loaded, task, config, progress)


def _answers(
    name: str, rows: Sequence[Row], loaded: Loaded, task: Task, config: RunConfig, progress: bool
) -> SetScore:
    examples = [task.example(row, loaded.tokenizer) for row in rows]
    decode = Decode.of(config, task.decoding, context_window(loaded.model, loaded.kind))
    texts = [example.prompt for example in examples]
    prompts = encode_prompts(texts, loaded.tokenizer, loaded.kind, decode, config.max_length)
    generated = generate(
        loaded.model,
        loaded.tokenizer,
        loaded.kind,
        prompts,
        decode,
        config.eval_batch_size,
        progress,
        f"scoring {name}",
    )
    predictions = []
    for index, (example, text) in enumerate(zip(examples, generated, strict=True)):
        scored = task.score(text, example) if task.metrics else None
        predictions.append(
            {
                **example.row,
                "index": index,
                "generated": text,
                "prediction": scored and scored.prediction,
                "answer": example.answer,
                "right": scored and scored.right,
            }
        )
    right = sum(bool(prediction["right"]) for prediction in predictions)
    metrics = {task.metrics[0]: right / len(rows)} if task.metrics else {}
    return SetScore(name, metrics, len(rows), predictions)


def _classes(
    name: str, rows: Sequence[Row], loaded: Loaded, task: Task, config: RunConfig, progress: bool
) -> SetScore:
    classified = [task.classified(row) for row in rows]
    items = []
    for text, row in zip(classified, rows, strict=True):
        item = classification(text, loaded.tokenizer, config.max_length, where=row.where)
        fields = {"input_ids": item.input_ids, "token_type_ids": item.token_type_ids}
        items.append({key: value for key, value in fields.items() if value is not None})
    collate = ClassificationCollator(pad_id(loaded.tokenizer))
    model = loaded.model

    def forward(batch: list[int]) -> list[list[float]]:
        inputs = {
            key: tensor.to(model.device)
            for key, tensor in collate([items[index] for index in batch]).items()
        }
        return model(**inputs).logits.float().tolist()

    with evaluating(model):
        lengths = [len(item["input_ids"]) for item in items]
        logits = torch.tensor(
            run_batches(lengths, config.eval_batch_size, forward, f"scoring {name}", progress)
        )
    for finite, row in zip(logits.isfinite().all(-1).tolist(), rows, strict=True):
        if not finite:
            raise UserError(
                f"model: got an output that is not finite for {row.where}, expected numbers; "
                "--dtype float32 may help"
            )
    values = (logits.squeeze(-1) if task.labels is None else logits.argmax(-1)).tolist()
    metrics = task.measure(values, [text.label for text in classified])
    predictions: list[dict[str, Any]] = [
        {
            **text.row,
            "index": index,
            "prediction": _label(value, task),
            "answer": _label(text.label, task),
        }
        for index, (text, value) in enumerate(zip(classified, values, strict=True))
    ]
    if task.labels is not None:
        for prediction, row in zip(predictions, logits.softmax(-1).tolist(), strict=True):
            prediction["probabilities"] = dict(zip(task.labels, row, strict=True))
    return SetScore(name, metrics, len(rows), predictions)


def _label(value: int | float, task: Task) -> str | float:
    return value if task.labels is None else task.labels[value]
