"""Report of a run: ``loss.png`` and ``report.html`` (results, curves, settings, versions)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_train import reporting
from reft_train.files import write_bytes
from reft_train.training.outcome import Outcome

PICTURE, PAGE = "loss.png", "report.html"
_PANELS = ("loss", "learning_rate", "orthonormality")


def run_curves(log: Sequence[Mapping[str, Any]]) -> bytes:
    """Plot the logged losses, learning rate and orthonormality as a PNG.

    Non-finite values are left out.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in log:
        for name in ("loss", "eval_loss", *_PANELS[1:]):
            if math.isfinite(entry.get(name, math.nan)):
                points.setdefault(name, []).append((entry["step"], entry[name]))
    panels = ["loss", *(name for name in _PANELS[1:] if name in points)]
    figure = reporting.new_figure(8, 3.1 + 1.4 * len(panels))
    ratios = [3.2, 1, 1][: len(panels)]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        if name in points:
            axis.plot(*zip(*points[name], strict=True), alpha=0.4, label=name)
        if name != "learning_rate" and all(value > 0 for _, value in points.get(name, ())):
            axis.set_yscale("log")
        axis.set_ylabel(name.replace("_", " "))
    if "loss" in points:
        steps, losses = zip(*points["loss"], strict=True)
        axes[0].plot(steps, reporting.smoothed(losses), "C0", label="loss, smoothed")
    if "eval_loss" in points:
        axes[0].plot(*zip(*points["eval_loss"], strict=True), "C3o-", label="held-out loss")
    if points:
        axes[0].legend()
    axes[-1].set_xlabel("step")
    return reporting.to_png(figure)


def write_run_report(folder: Path, outcome: Outcome, log: Sequence[Mapping[str, Any]]) -> None:
    png = write_bytes(folder / PICTURE, run_curves(log)).read_bytes()
    losses = [entry for entry in log if "loss" in entry]
    bad = [entry["step"] for entry in losses if not math.isfinite(entry["loss"])]
    text = f"{len(bad)} of {len(losses)} logged losses are not finite and not drawn"
    title = f"{outcome.config['method']} on {outcome.config['model']}"
    sections = {
        "Results": [outcome.figures()],
        "Curves": [png, *([f"{text}, the first at step {bad[0]}"] if bad else [])],
        "Settings": [outcome.config],
        "Versions": [outcome.versions],
    }
    reporting.write_page(folder / PAGE, title, sections)
