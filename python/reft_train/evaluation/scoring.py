"""Scores and predictions of a model on sets of rows, and their files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas
import torch
from torch.nn.functional import cross_entropy, mse_loss

from reft_train.config import RunConfig
from reft_train.data.collating import PaddingCollator
from reft_train.data.tokenizing import Encoder
from reft_train.errors import wrong
from reft_train.evaluation.generating import generate, run_batches
from reft_train.files import dumps, replace_folder, write_text
from reft_train.models import CLASSIFICATION, Loaded, evaluating
from reft_train.tasks.base import Row, Task

PREDICTIONS = "predictions"


@dataclass(frozen=True)
class SetScore:
    """Metrics of a set by name, main metric first (empty if it is not scored), and predictions.

    ``loss`` is the mean loss over the rows for models that classify.
    """

    name: str
    metrics: dict[str, float]
    count: int
    predictions: list[dict[str, Any]] = field(repr=False)
    loss: float | None = None


def score_set(
    name: str,
    rows: Sequence[Row],
    loaded: Loaded,
    task: Task,
    config: RunConfig,
    *,
    progress: bool = True,
) -> SetScore:
    """Score a model on rows. Greedy results do not depend on row order or batch size.

    Args:
        name: name of the set.
        loaded: the model, adapted or not; its device and mode are not changed.
        config: batch size, lengths and decoding.

    Returns:
        The score. A prediction has its row's fields, ``index``, ``prediction`` and ``answer``. For
            generated answers it also has ``generated`` and ``right`` (None if the task has no
            rule), and for classes ``probabilities`` by label.
    """
    if not rows:
        raise wrong(f"test set {name}", "no rows", "at least one")
    encoder = Encoder(task, loaded.tokenizer, loaded.kind, config.max_length)
    score = _classes if loaded.kind == CLASSIFICATION else _answers
    title = f"scoring {name}"
    metrics, predictions, loss = score(rows, loaded.model, encoder, config, title, progress)
    predictions = [{**row, "index": index, **rest} for index, (row, rest) in enumerate(predictions)]
    return SetScore(name, metrics, len(rows), predictions, loss)


def _answers(
    rows: Sequence[Row], model: Any, encoder: Encoder, config: RunConfig, title: str, progress: bool
) -> tuple:
    examples, task = [encoder.read(row) for row in rows], encoder.task
    texts = [example.prompt for example in examples]
    generated = generate(model, encoder, texts, config, title, progress)
    predictions = []
    for example, text in zip(examples, generated, strict=True):
        scored = task.score(text, example)
        record = {"generated": text, "prediction": scored.prediction}
        record |= {"answer": example.answer, "right": scored.right}
        predictions.append((example.row, record))
    right = sum(bool(record["right"]) for _, record in predictions)
    return {task.metrics[0]: right / len(rows)} if task.metrics else {}, predictions, None


def _classes(
    rows: Sequence[Row], model: Any, encoder: Encoder, config: RunConfig, title: str, progress: bool
) -> tuple:
    classified, task = [encoder.read(row) for row in rows], encoder.task
    items = encoder.encode(classified, [row.where for row in rows])
    collate = PaddingCollator(encoder.tokenizer.pad_token_id)

    def forward(batch: list[int]) -> list[list[float]]:
        inputs = collate([items[index].columns() for index in batch])
        del inputs["labels"]
        inputs = {key: tensor.to(model.device) for key, tensor in inputs.items()}
        return model(**inputs).logits.float().tolist()

    with evaluating(model):
        lengths, size = [len(item.input_ids) for item in items], config.eval_batch_size
        logits = torch.tensor(run_batches(lengths, size, forward, title, progress))
    for finite, row in zip(logits.isfinite().all(-1).tolist(), rows, strict=True):
        if not finite:
            hint = "numbers; --dtype float32 may help"
            raise wrong("model", f"an output that is not finite for {row.where}", hint)
    labels = torch.tensor([text.label for text in classified])
    if task.labels is None:
        loss, values = mse_loss(logits.squeeze(-1), labels), logits.squeeze(-1).tolist()
    else:
        loss, values = cross_entropy(logits, labels), logits.argmax(-1).tolist()
    predictions = []
    for text, value, shares in zip(classified, values, logits.softmax(-1).tolist(), strict=True):
        record = {"prediction": value, "answer": text.label}
        if task.labels is not None:
            record = {key: task.labels[number] for key, number in record.items()}
            record["probabilities"] = dict(zip(task.labels, shares, strict=True))
        predictions.append((text.row, record))
    return task.measure(values, labels.tolist()), predictions, loss.item()


def average(scores: Sequence[SetScore]) -> dict[str, float]:
    """Average every metric that all sets have, with equal weight per set."""
    frame = pandas.DataFrame([score.metrics for score in scores])
    return frame.dropna(axis=1).mean().to_dict()


def render(scores: Sequence[SetScore]) -> str:
    """Format scores in percent, one row per set, and their average if there are several."""
    rows = [{"set": score.name, **score.metrics, "rows": score.count} for score in scores]
    if len(scores) > 1 and average(scores):
        rows.append({"set": "average", **average(scores), "rows": sum(s.count for s in scores)})
    shown = "{:.1%}".format
    return pandas.DataFrame(rows).to_string(index=False, na_rep="-", float_format=shown)


def write_scores(folder: Path, scores: Sequence[SetScore], about: Mapping[str, Any]) -> Path:
    """Write ``scores.json``: ``about``, ``sets`` (metrics and row counts) and their ``average``."""
    sets = {score.name: {**score.metrics, "rows": score.count} for score in scores}
    content = {**about, "sets": sets, "average": average(scores)}
    return write_text(folder / "scores.json", dumps(content))


def write_predictions(folder: Path, scores: Sequence[SetScore]) -> None:
    """Write ``predictions/<set>.jsonl`` with one object per row, replacing old predictions."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{PREDICTIONS}.") as staged:
        for score in scores:
            # Parquet has dates and other types that JSON lacks
            rows = (json.dumps(row, ensure_ascii=False, default=str) for row in score.predictions)
            name = quote(score.name, safe="")  # a set's name may be a path
            write_text(Path(staged) / "new" / f"{name}.jsonl", "\n".join([*rows, ""]))
        replace_folder(Path(staged) / "new", folder / PREDICTIONS)
