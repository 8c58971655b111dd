"""Class metrics as GLUE defines them: fractions and correlations from 0, or -1, to 1."""

from __future__ import annotations

from collections.abc import Sequence

Numbers = Sequence[int | float]


def _checked(predictions: Numbers, references: Numbers) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(
            f"predictions: got {len(predictions)} for {len(references)} references, expected one "
            "for each"
        )


def accuracy(predictions: Numbers, references: Numbers) -> float:
    """The fraction of predictions that equal their reference."""
    _checked(predictions, references)
    return sum(given == right for given, right in zip(predictions, references, strict=True)) / len(
        references
    )


def f1(predictions: Numbers, references: Numbers) -> float:
    """F1 of class 1; 0 where class 1 occurs in neither."""
    from sklearn.metrics import f1_score

    _checked(predictions, references)
    return float(f1_score(references, predictions, zero_division=0.0))


def matthews(predictions: Numbers, references: Numbers) -> float:
    """Matthews' correlation; 0 where all predictions are of one class."""
    from sklearn.metrics import matthews_corrcoef

    _checked(predictions, references)
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Numbers, references: Numbers) -> float:
    """Pearson's correlation; 0 where either side is constant, for it then tells nothing of the
    other.
    """
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Numbers, references: Numbers) -> float:
    """Spearman's rank correlation; 0 where either side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _correlation(correlate, predictions: Numbers, references: Numbers) -> float:
    _checked(predictions, references)
    if len(set(predictions)) == 1 or len(set(references)) == 1:
        return 0.0
    return float(correlate(predictions, references).statistic)


MEASURES = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
