"""Result files: ``scores.json``, ``predictions/`` and ``alpaca_eval/``."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_train.evaluation.scoring import SetScore, average
from reft_train.files import dumps, replace_folder, write_text
from reft_train.tasks.base import Task
from reft_train.tasks.instruct import alpaca_eval_row

PREDICTIONS, ALPACA_EVAL = "predictions", "alpaca_eval"


def write_scores(folder: Path, scores: Sequence[SetScore], about: Mapping[str, Any]) -> Path:
    """Write ``scores.json``: ``about``, ``sets`` (metrics and row counts) and their ``average``."""
    sets = {score.name: {**score.metrics, "rows": score.count} for score in scores}
    content = {**about, "sets": sets, "average": average(scores)}
    return write_text(folder / "scores.json", dumps(content))


def write_predictions(folder: Path, task: Task, scores: Sequence[SetScore], generator: str) -> None:
    """Write ``predictions/<set>.jsonl`` with one object per row, replacing old predictions.

    For a task that is not scored here, also write ``alpaca_eval/<set>.json`` for ``alpaca_eval
    --model_outputs``; ``generator`` is the model's name in it.
    """
    names: list[str] = []
    for score in scores:
        names.append(file_name(score.name, names))
    lines, answers = {}, {}
    for name, score in zip(names, scores, strict=True):
        # Parquet has dates and other types that JSON lacks
        rows = (json.dumps(row, ensure_ascii=False, default=str) for row in score.predictions)
        lines[f"{name}.jsonl"] = "".join(f"{row}\n" for row in rows)
        if not task.metrics:
            outputs = [alpaca_eval_row(row, generator) for row in score.predictions]
            answers[f"{name}.json"] = dumps(outputs)
    for part, contents in ((PREDICTIONS, lines), (ALPACA_EVAL, answers)):
        if contents:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=f".{part}.") as staged:
                for name, content in contents.items():
                    write_text(Path(staged) / "new" / name, content)
                replace_folder(Path(staged) / "new", folder / part)


def file_name(name: str, taken: Sequence[str]) -> str:
    """Convert a set's name, possibly a path, to a file name that is not in ``taken``."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "set"
    candidates = [plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)
