"""Scores and predictions as files: ``scores.json``, ``predictions/<set>.jsonl`` and
``alpaca_eval/<set>.json``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.evaluation.table import average
from reft_train.files import replace_folder, write_text

if TYPE_CHECKING:
    from reft_train.evaluation.scoring import SetScore

SCORES, PREDICTIONS, ALPACA_EVAL = "scores.json", "predictions", "alpaca_eval"


def write_scores(folder: Path, scores: Sequence[SetScore], about: Mapping[str, Any]) -> Path:
    """Write ``scores.json``: ``about``, then ``sets`` (metrics and number of rows of each) and
    their ``average``.
    """
    sets = {score.name: {**_numbers(score.metrics), "rows": score.count} for score in scores}
    content = {**about, "sets": sets, "average": _numbers(average(scores))}
    return write_text(folder / SCORES, json.dumps(content, indent=1, ensure_ascii=False))


def write_predictions(folder: Path, scores: Sequence[SetScore]) -> Path:
    """Write ``predictions/<set>.jsonl``, one JSON object a row; predictions that were there go."""
    return _write_folder(
        folder / PREDICTIONS, scores, ".jsonl", lambda score: "".join(map(_line, score.predictions))
    )


def write_alpaca_eval(folder: Path, scores: Sequence[SetScore], generator: str) -> Path:
    """Write ``alpaca_eval/<set>.json``, which ``alpaca_eval --model_outputs`` reads.

    Args:
        generator: the model's name in that program's tables.
    """
    from reft_train.tasks.base import Example
    from reft_train.tasks.instruct import alpaca_eval_rows

    def content(score: SetScore) -> str:
        examples = [
            Example("", "", prediction["answer"], prediction) for prediction in score.predictions
        ]
        rows = alpaca_eval_rows(
            examples, [prediction["generated"] for prediction in score.predictions], generator
        )
        return json.dumps(rows, indent=1, ensure_ascii=False)

    return _write_folder(folder / ALPACA_EVAL, scores, ".json", content)


def _write_folder(
    folder: Path, scores: Sequence[SetScore], suffix: str, content: Callable[[SetScore], str]
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.")) / "new"
    try:
        taken: set[str] = set()
        for score in scores:
            name = file_name(score.name, taken)
            taken.add(name)
            write_text(whole / (name + suffix), content(score))
        return replace_folder(whole, folder)
    finally:
        shutil.rmtree(whole.parent, ignore_errors=True)


def file_name(name: str, taken: set[str]) -> str:
    """A set's name (which may be a path) as a file's, unlike those that are ``taken``."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_.") or "set"
    numbered = (f"{plain}-{number}" for number in range(2, len(taken) + 3))
    return plain if plain not in taken else next(other for other in numbered if other not in taken)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {
        name: None if math.isnan(value) else value for name, value in metrics.items()
    }  # JSON has no NaN


def _line(prediction: Mapping[str, Any]) -> str:
    return (
        json.dumps(prediction, ensure_ascii=False, default=str) + "\n"
    )  # Parquet has dates and more
