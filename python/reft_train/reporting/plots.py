"""Figures as PNG without pyplot: no display and no global state."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def smoothed(losses: Iterable[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, curve = 0.0, 0.0, []
    for loss in losses:
        total = weight * total + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        curve.append(total / norm)
    return curve


def new_figure(size: Sequence[float] = (8, 4.5)) -> Figure:
    """An empty figure of ``size`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=tuple(size), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes, the same on every drawing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
