"""GLUE: nine sets of sentences or sentence pairs, with GLUE's metrics; the paper reports the first.

All sets are classification tasks, except STS-B, which is a regression. MNLI is its matched part.
"""

from __future__ import annotations

from reft_train.errors import wrong
from reft_train.tasks import fields
from reft_train.tasks.base import Classified, Row, Task

_PAIR, _ENTAILMENT = ("sentence1", "sentence2"), ("entailment", "not_entailment")
_THREE, _MNLI = ("entailment", "neutral", "contradiction"), ("premise", "hypothesis")
_QQP = ("question1", "question2")
# texts; labels ordered by their numbers in the published files, None: numbers from 0 to 5; metrics
SETS: dict[str, tuple] = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), "matthews"),
    "sst2": (("sentence",), ("negative", "positive"), "accuracy"),
    "mrpc": (_PAIR, ("not_equivalent", "equivalent"), "accuracy", "f1"),
    "qqp": (_QQP, ("not_duplicate", "duplicate"), "accuracy", "f1"),
    "stsb": (_PAIR, None, "pearson", "spearman"),
    "mnli": (_MNLI, _THREE, "accuracy"),
    "qnli": (("question", "sentence"), _ENTAILMENT, "accuracy"),
    "rte": (_PAIR, _ENTAILMENT, "accuracy"),
    "wnli": (_PAIR, ("not_entailment", "entailment"), "accuracy"),
}


class Glue(Task):
    """One set, named ``glue/<set>``; ``labels`` is None for STS-B, a regression."""

    def __init__(self, subset: str) -> None:
        self.subset = subset
        self.name = self.recipe = f"glue/{subset}"
        self.text_fields, self.labels, *self.metrics = SETS[subset]
        self.test_sets = ("validation_matched" if subset == "mnli" else "validation",)

    def classified(self, row: Row) -> Classified:
        """See :meth:`Task.classified`. A label is a class number or a label's name."""
        texts = [fields.string(row, name) for name in self.text_fields]
        if not any(text.strip() for text in texts):  # QQP has a few pairs with one empty question
            raise wrong(f"{row.where}: {' and '.join(self.text_fields)}", "no text", "some")
        number = self._number(fields.answer(row, "label"), f"{row.where}: label")
        return Classified(texts[0], texts[1] if len(texts) == 2 else None, number, row.fields)

    def _number(self, label: str, where: str) -> int | float:
        if self.labels is not None:
            known = dict(zip(self.labels, range(len(self.labels)), strict=True))
            known |= {str(number): number for number in known.values()}
            if label in known:
                return known[label]
            names = (f"{number} ({name})" for number, name in enumerate(self.labels))
            raise wrong(where, repr(label), f"one of {', '.join(names)}")
        try:
            value = float(label)
        except ValueError:
            value = -1.0
        if not 0.0 <= value <= 5.0:
            raise wrong(where, repr(label), "a number from 0 to 5")
        return value


def selection_rows(n: int) -> int:
    """Return how many of ``n`` validation rows select models; the others are reported.

    That is 1,000 rows, or half of them (rounded down) if there are fewer than 5,000.
    """
    if n < 2:
        raise wrong("validation", f"{n} rows", "at least 2: some for selection, the rest reported")
    return 1000 if n >= 5000 else n // 2
