"""Classification metrics as defined by GLUE: fractions and correlations up to 1."""

from __future__ import annotations

from collections.abc import Sequence

Numbers = Sequence[int | float]


def measure(name: str, predictions: Numbers, references: Numbers) -> float:
    """Compute a metric by name: accuracy, f1 (of class 1), matthews, pearson or spearman."""
    from scipy import stats
    from sklearn import metrics

    pairs = (references, predictions)
    if name in ("pearson", "spearman"):
        if len(set(predictions)) == 1 or len(set(references)) == 1:
            return 0.0  # the correlation with a constant is undefined
        return float(getattr(stats, f"{name}r")(*pairs).statistic)
    if name == "f1":
        return float(metrics.f1_score(*pairs, zero_division=0.0))
    names = {"accuracy": metrics.accuracy_score, "matthews": metrics.matthews_corrcoef}
    return float(names[name](*pairs))
