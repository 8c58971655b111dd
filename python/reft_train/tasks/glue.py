"""GLUE: nine sets of sentences or sentence pairs, with GLUE's metrics.

All sets are classification tasks, except STS-B, which is a regression.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from reft_train.errors import UserError
from reft_train.tasks import fields
from reft_train.tasks.base import Classified, Row, Task
from reft_train.tasks.measures import measure

_ENTAILMENT = ("entailment", "not_entailment")
STSB_RANGE = (0.0, 5.0)


@dataclass(frozen=True)
class _Set:
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"


# labels ordered by their numbers in the published files
SETS = {
    "cola": _Set(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": _Set(("sentence",), ("negative", "positive")),
    "mrpc": _Set(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": _Set(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": _Set(("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "mnli": _Set(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
    ),
    "qnli": _Set(("question", "sentence"), _ENTAILMENT),
    "rte": _Set(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": _Set(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}


class Glue(Task):
    """One set, named ``glue/<set>``; ``labels`` is None for STS-B, a regression."""

    def __init__(self, subset: str) -> None:
        kind = SETS[subset]
        self.subset = subset
        self.name = self.recipe = f"glue/{subset}"
        self.text_fields = kind.texts
        self.labels, self.metrics, self.test_sets = kind.labels, kind.metrics, (kind.validation,)

    def classified(self, row: Row) -> Classified:
        """See :meth:`Task.classified`. A label is a class number or a label's name."""
        known = (*self.text_fields, "label", "idx")
        texts = [fields.string(row, name, known) for name in self.text_fields]
        if not any(text.strip() for text in texts):  # QQP has a few pairs with one empty question
            raise UserError(
                f"{row.where}: {' and '.join(self.text_fields)}: got no text, expected some"
            )
        label = fields.answer(row, "label", known)
        number = self._class(label, row) if self.labels else self._similarity(label, row)
        return Classified(texts[0], texts[1] if len(texts) == 2 else None, number, row.fields)

    def _class(self, label: str, row: Row) -> int:
        if label in self.labels:
            return self.labels.index(label)
        if label in map(str, range(len(self.labels))):
            return int(label)
        expected = ", ".join(f"{number} ({name})" for number, name in enumerate(self.labels))
        raise UserError(f"{row.where}: label: got {label!r}, expected one of {expected}")

    def _similarity(self, label: str, row: Row) -> float:
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not STSB_RANGE[0] <= value <= STSB_RANGE[1]:
            raise UserError(f"{row.where}: label: got {label!r}, expected a number from 0 to 5")
        return value

    def measure(
        self, predictions: Sequence[int | float], references: Sequence[int | float]
    ) -> dict[str, float]:
        """Compute GLUE's metrics for the set; the paper reports the first one.

        CoLA: Matthews' correlation. MRPC and QQP: accuracy, F1. STS-B: Pearson's and Spearman's
        correlations. The others: accuracy, for MNLI on its matched part.
        """
        return {name: measure(name, predictions, references) for name in self.metrics}


def validation_split(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Split ``n`` validation rows by seed into rows for model selection and rows for reporting.

    The selection part has 1,000 rows, or half of the rows (rounded down) if there are fewer than
    5,000.

    Returns:
        The row numbers of both parts in ascending order.
    """
    if n < 2:
        raise UserError(
            f"validation: got {n} rows, expected at least 2: some to choose the model, the rest "
            "to report"
        )
    order = list(range(n))
    random.Random(seed).shuffle(order)
    count = 1000 if n >= 5000 else n // 2
    return sorted(order[:count]), sorted(order[count:])


def tasks() -> list[Task]:
    """Return the nine sets."""
    return [Glue(subset) for subset in SETS]
