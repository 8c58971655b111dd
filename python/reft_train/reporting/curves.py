"""The curves of one run, drawn from its log: loss, learning rate, and how far R is from
orthonormal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reft_train.reporting.plots import new_figure, smoothed, to_png

Series = list[tuple[int, float]]


def series(log: Iterable[Mapping[str, Any]], name: str) -> Series:
    """(step, value) pairs of the entries that have ``name``, by step; a resumed run's later
    entry for a step counts.
    """
    found: dict[int, float] = {}
    for entry in log:
        value, step = entry.get(name), entry.get("step")
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and isinstance(step, int | float)
        ):
            found[int(step)] = float(value)
    return sorted(found.items())


def finite(points: Series) -> Series:
    """The points that can be drawn."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def _scale(values: Iterable[float]) -> str:
    return "log" if all(value > 0 for value in values) else "linear"


def _small_panel(axes: Any, points: Series, label: str, scale: str) -> None:
    axes.plot(*zip(*points, strict=True), color="#444444", linewidth=1)
    axes.set(ylabel=label, yscale=scale)
    axes.grid(alpha=0.3)


def run_curves(log: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG: training loss (raw faint, smoothed) and held-out loss; below, learning rate and
    orthonormality where logged.

    Values that are not finite are left out.
    """
    training, held_out, rates, gaps = (
        finite(series(log, name))
        for name in ("loss", "eval_loss", "learning_rate", "orthonormality")
    )
    below = [
        (points, label, scale)
        for points, label, scale in (
            (rates, "learning rate", "linear"),
            (gaps, "max |R Rᵀ − I|", _scale(value for _, value in gaps)),
        )
        if points
    ]
    figure = new_figure((8, 4.5 + 1.4 * len(below)))
    grid = figure.subplots(
        1 + len(below), sharex=True, squeeze=False, height_ratios=[3.2] + [1] * len(below)
    )
    panels = [row[0] for row in grid]
    loss = panels[0]
    if training:
        steps, values = zip(*training, strict=True)
        loss.plot(steps, values, color="#1f77b4", alpha=0.25, linewidth=0.8)
        loss.plot(steps, smoothed(values), color="#1f77b4", label="training, smoothed")
    if held_out:
        loss.plot(
            *zip(*held_out, strict=True),
            color="#d62728",
            marker="o",
            markersize=3,
            label="held out",
        )
    if training or held_out:
        loss.set(ylabel="loss", yscale=_scale(value for _, value in training + held_out))
        loss.legend()
    else:
        loss.text(
            0.5, 0.5, "no loss was logged", ha="center", va="center", transform=loss.transAxes
        )
    loss.grid(alpha=0.3, which="both")
    for panel, (points, label, scale) in zip(panels[1:], below, strict=True):
        _small_panel(panel, points, label, scale)
    panels[-1].set_xlabel("step")
    return to_png(figure)
