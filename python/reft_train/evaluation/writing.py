"""Result files: ``scores.json``, ``predictions/`` and ``alpaca_eval/``."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_train.evaluation.scoring import SetScore, average
from reft_train.files import dumps, replace_folder, write_text
from reft_train.tasks.base import Example
from reft_train.tasks.instruct import alpaca_eval_rows

SCORES, PREDICTIONS, ALPACA_EVAL = "scores.json", "predictions", "alpaca_eval"


def write_scores(folder: Path, scores: Sequence[SetScore], about: Mapping[str, Any]) -> Path:
    """Write ``scores.json``: ``about``, ``sets`` (metrics and row counts) and their ``average``."""
    sets = {score.name: {**score.metrics, "rows": score.count} for score in scores}
    return write_text(folder / SCORES, dumps({**about, "sets": sets, "average": average(scores)}))


def write_predictions(folder: Path, scores: Sequence[SetScore]) -> Path:
    """Write ``predictions/<set>.jsonl`` with one object per row, replacing old predictions."""

    def content(score: SetScore) -> str:
        # Parquet has dates and other types that JSON lacks
        return "".join(
            json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in score.predictions
        )

    return _write_folder(folder / PREDICTIONS, scores, ".jsonl", content)


def write_alpaca_eval(folder: Path, scores: Sequence[SetScore], generator: str) -> Path:
    """Write ``alpaca_eval/<set>.json`` for ``alpaca_eval --model_outputs``.

    ``generator`` is the model's name.
    """

    def content(score: SetScore) -> str:
        examples = [Example("", "", row["answer"], row) for row in score.predictions]
        return dumps(
            alpaca_eval_rows(examples, [row["generated"] for row in score.predictions], generator)
        )

    return _write_folder(folder / ALPACA_EVAL, scores, ".json", content)


def _write_folder(
    folder: Path, scores: Sequence[SetScore], suffix: str, content: Callable[[SetScore], str]
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")) / "new"
    try:
        taken: set[str] = set()
        for score in scores:
            name = file_name(score.name, taken)
            taken.add(name)
            write_text(staged / (name + suffix), content(score))
        return replace_folder(staged, folder)
    finally:
        shutil.rmtree(staged.parent, ignore_errors=True)


def file_name(name: str, taken: set[str]) -> str:
    """Convert a set's name, possibly a path, to a file name that is not in ``taken``."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "set"
    numbered = (f"{plain}-{number}" for number in range(2, len(taken) + 3))
    return plain if plain not in taken else next(other for other in numbered if other not in taken)
