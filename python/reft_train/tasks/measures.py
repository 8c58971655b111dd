"""Classification metrics as defined by GLUE: fractions and correlations up to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Numbers = Sequence[int | float]


def accuracy(predictions: Numbers, references: Numbers) -> float:
    """Return the fraction of predictions that equal their reference."""
    pairs = zip(predictions, references, strict=True)
    return sum(predicted == right for predicted, right in pairs) / len(references)


def _f1(predictions: Numbers, references: Numbers) -> float:
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, zero_division=0.0)


def _matthews(predictions: Numbers, references: Numbers) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(references, predictions)


def _correlation(name: str) -> Callable[[Numbers, Numbers], float]:
    def correlation(predictions: Numbers, references: Numbers) -> float:
        from scipy import stats

        if len(set(predictions)) == 1 or len(set(references)) == 1:
            return 0.0  # the correlation with a constant is undefined
        return getattr(stats, name)(predictions, references).statistic

    return correlation


_MEASURES = {
    "accuracy": accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def measure(name: str, predictions: Numbers, references: Numbers) -> float:
    """Compute a metric by name: accuracy, f1 (of class 1), matthews, pearson or spearman."""
    if len(predictions) != len(references) or not len(references):
        count = f"{len(predictions)} for {len(references)} references"
        raise ValueError(f"predictions: got {count}, expected one for each")
    return float(_MEASURES[name](predictions, references))
