"""Interface of tasks: conversion of rows to model inputs, and scoring of outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row of a data file; ``where`` is its location, such as "row 17 of train.json"."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Example:
    """A prompt with its training ``target`` and the ``answer`` used for scoring.

    ``row`` holds the fields that prediction files repeat.
    """

    prompt: str
    target: str
    answer: str
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Classified:
    """A text or a pair of texts, labelled with a class number or a real number."""

    text: str
    pair: str | None
    label: int | float
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scored:
    """Scoring result of a generated text: the extracted answer or None, and whether it is right.

    ``right`` is None if the task has no rule.
    """

    prediction: str | None
    right: bool | None


@dataclass(frozen=True)
class Decoding:
    """Default generation settings of a task: greedy, at most ``max_new_tokens``."""

    max_new_tokens: int
    max_total_tokens: int | None = None


class Task:
    """Base class of tasks. Subclasses define how rows are read and answers are scored.

    A missing, misspelt or empty field, or an unknown label, raises UserError.

    Attributes:
        recipe: recipe with the task's default settings.
        decoding: generation settings; None if nothing is generated.
        labels: class labels; None without classes.
        test_sets: names of the reported sets, each ``<name>/test.json`` in a data folder.
        metrics: names of the metrics of :meth:`measure`; the first one selects models.
    """

    name: str
    recipe: str
    decoding: Decoding | None = None
    labels: Sequence[str] | None = None
    test_sets: Sequence[str] = ()
    metrics: Sequence[str] = ("accuracy",)

    @property
    def num_labels(self) -> int:
        """Number of classifier outputs: one per label, or one for regression."""
        return 1 if self.labels is None else len(self.labels)

    def example(self, row: Row, tokenizer: Any = None) -> Example:
        """Return a row's prompt and target; ``tokenizer`` is used by tasks with chat templates."""
        raise NotImplementedError(f"{self.name} has no prompts to continue")

    def training_rows(self, row: Row) -> list[Row]:
        """Return the training rows of a file's row: the row itself, or one for each answer."""
        return [row]

    def classified(self, row: Row) -> Classified:
        """Return a row's texts and class number."""
        raise NotImplementedError(f"{self.name} has no classes")

    def score(self, generated: str, example: Example) -> Scored:
        """Extract the answer from a generated text and compare it."""
        raise NotImplementedError(f"{self.name} is not scored by generation")

    def measure(
        self, predictions: Sequence[int | float], references: Sequence[int | float]
    ) -> dict[str, float]:
        """Compute the metrics of predicted classes or numbers, as GLUE defines them.

        accuracy, f1 (of class 1), matthews, pearson and spearman are fractions or correlations up
        to 1.
        """
        return {name: _measure(name, references, predictions) for name in self.metrics}


def _measure(name: str, *pairs: Sequence[int | float]) -> float:
    from scipy import stats
    from sklearn import metrics

    if name in ("pearson", "spearman"):
        if any(len(set(values)) == 1 for values in pairs):
            return 0.0  # the correlation with a constant is undefined
        return float(getattr(stats, f"{name}r")(*pairs).statistic)
    if name == "f1":
        return float(metrics.f1_score(*pairs, zero_division=0.0))
    names = {"accuracy": metrics.accuracy_score, "matthews": metrics.matthews_corrcoef}
    return float(names[name](*pairs))
