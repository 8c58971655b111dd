"""Report of a run: ``loss.png`` and ``report.html`` (results, curves, settings, versions)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_train.files import write_bytes
from reft_train.reporting import page
from reft_train.reporting.versions import versions
from reft_train.training.outcome import Outcome

PICTURE, PAGE = "loss.png", "report.html"
Log = Sequence[Mapping[str, Any]]


def series(log: Log, name: str) -> list[tuple[int, float]]:
    """Return (step, value) pairs of entries with ``name``; the last entry of a step is used."""
    numbers = int | float
    return sorted(
        {
            int(entry["step"]): float(entry[name])
            for entry in log
            if isinstance(entry.get(name), numbers) and isinstance(entry.get("step"), numbers)
        }.items()
    )


def run_curves(log: Log) -> bytes:
    """Plot training and held-out loss as a PNG, with learning rate and orthonormality if logged.

    Non-finite values are left out.
    """
    names = ("loss", "eval_loss", "learning_rate", "orthonormality")
    training, held_out, rates, gaps = (
        [(step, value) for step, value in series(log, name) if math.isfinite(value)]
        for name in names
    )
    below = [
        (part, title)
        for part, title in ((rates, "learning rate"), (gaps, "max |R Rᵀ − I|"))
        if part
    ]
    figure = page.new_figure(8, 4.5 + 1.4 * len(below))
    ratios = [3.2] + [1] * len(below)
    panels = figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    if training:
        steps, values = zip(*training, strict=True)
        panels[0].plot(steps, values, color="C0", alpha=0.25, linewidth=0.8)
        panels[0].plot(steps, page.smoothed(values), color="C0", label="training, smoothed")
    if held_out:
        panels[0].plot(*zip(*held_out, strict=True), "C3o-", markersize=3, label="held out")
    if training or held_out:
        panels[0].legend()
    for panel, (points, title) in zip(panels, [(training + held_out, "loss"), *below], strict=True):
        if title != "loss":
            panel.plot(*zip(*points, strict=True), color="0.3", linewidth=1)
        positive = title != "learning rate" and all(value > 0 for _, value in points)
        panel.set(ylabel=title, yscale="log" if positive and points else "linear")
        panel.grid(alpha=0.3)
    panels[-1].set_xlabel("step")
    return page.to_png(figure)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(outcome: Outcome) -> list[str]:
    parts = []
    if outcome.validation:
        rows = [(name, _text(value)) for name, value in outcome.validation.items()]
        parts += [page.heading("Held-out training rows"), page.table(("metric", "value"), rows)]
    if outcome.tests:
        names = list(dict.fromkeys(name for metrics in outcome.tests.values() for name in metrics))
        rows = [
            (test, *(_text(metrics.get(name, "")) for name in names))
            for test, metrics in outcome.tests.items()
        ]
        parts += [page.heading("Test sets"), page.table(("test set", *names), rows)]
    return parts


def write_run_report(folder: Path, outcome: Outcome, log: Log) -> list[Path]:
    """Write ``loss.png`` and ``report.html``; losses missing in the log come from the outcome."""
    if not series(log, "loss"):
        log = [*log, *({"step": step, "loss": loss} for step, loss in outcome.losses)]
    png, losses = run_curves(log), series(log, "loss")
    bad = [step for step, value in losses if not math.isfinite(value)]
    notes = ["Interrupted before the end."] if outcome.interrupted else []
    if bad:
        count = f"{len(bad)} of {len(losses)}"
        notes.append(
            f"{count} logged losses are not finite, the first at step {bad[0]}; they are not drawn."
        )
    config = outcome.config
    title = " on ".join(str(config[name]) for name in ("method", "model") if name in config)
    parts = [
        *map(page.note, notes),
        page.facts(outcome.figures()),
        *_scores(outcome),
        page.heading("Loss"),
        page.image(png, "Training loss by step, and its moving average"),
        page.heading("Settings"),
        page.facts(config),
        page.heading("Versions"),
        page.facts(outcome.versions or versions()),
    ]
    return [write_bytes(folder / PICTURE, png), page.write_page(folder / PAGE, title, *parts)]
