"""Scores of several sets as the paper's tables show them: one row a set, the average over sets
below, in hundredths.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_train.evaluation.scoring import SetScore

AVERAGE = "average"


def average(scores: Sequence[SetScore]) -> dict[str, float]:
    """The mean over sets, each set counting once, of every metric that all of them have."""
    shared = (
        [name for name in scores[0].metrics if all(name in score.metrics for score in scores)]
        if scores
        else []
    )
    return {name: statistics.fmean(score.metrics[name] for score in scores) for name in shared}


def render(scores: Sequence[SetScore]) -> str:
    """The table as aligned text; the average is there where there are several sets."""
    names = list(dict.fromkeys(name for score in scores for name in score.metrics))
    lines = [("set", *names, "rows")]
    lines += [
        (score.name, *(_shown(score.metrics.get(name)) for name in names), f"{score.count:,}")
        for score in scores
    ]
    if len(scores) > 1 and names:
        means = average(scores)
        total = sum(score.count for score in scores)
        lines.append((AVERAGE, *(_shown(means.get(name)) for name in names), f"{total:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(_aligned(line, widths) for line in lines)


def _shown(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
    return "  ".join([line[0].ljust(widths[0]), *cells])
