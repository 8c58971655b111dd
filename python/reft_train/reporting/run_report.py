"""A run's report: ``loss.png`` and a self-contained ``report.html`` with figures, curves,
settings and versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.files import write_bytes, write_text
from reft_train.reporting.curves import finite, run_curves, series
from reft_train.reporting.html import image, note, page, table
from reft_train.reporting.versions import versions

if TYPE_CHECKING:
    from reft_train.training.outcome import Outcome

PICTURE, PAGE = "loss.png", "report.html"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def figures(outcome: Outcome) -> list[tuple[str, str]]:
    """What the run measured, as (name, value) lines."""
    share = (
        f" ({outcome.trainable / outcome.total:.4%} of the model's {outcome.total:,})"
        if outcome.total
        else ""
    )
    lines = [("trained parameters", f"{outcome.trainable:,}{share}")]
    if outcome.head:
        lines.append(("trained parameters of the head", f"{outcome.head:,}"))
    lines += [
        (
            "optimizer steps",
            f"{outcome.steps:,}" + (" (interrupted)" if outcome.interrupted else ""),
        ),
        ("training time", f"{outcome.seconds:,.1f} s"),
        ("time of a step, median", f"{outcome.step_seconds:.4g} s"),
        ("tokens per second, padding excluded", f"{outcome.tokens_per_second:,.0f}"),
        (
            "peak memory",
            f"{outcome.memory.peak:,.0f} MiB, {outcome.memory.before:,.0f} MiB of it before "
            "training",
        ),
    ]
    if outcome.orthonormality is not None:
        lines.append(("max |R Rᵀ − I| at the end", f"{outcome.orthonormality:.2e}"))
    return lines


def _scores(outcome: Outcome) -> str:
    parts = []
    if outcome.validation:
        lines = [(name, _text(value)) for name, value in outcome.validation.items()]
        parts.append("<h2>Held-out training rows</h2>" + table(("metric", "value"), lines))
    if outcome.tests:
        names = list(dict.fromkeys(name for metrics in outcome.tests.values() for name in metrics))
        lines = [
            (which, *(_text(metrics[name]) if name in metrics else "" for name in names))
            for which, metrics in outcome.tests.items()
        ]
        parts.append("<h2>Test sets</h2>" + table(("test set", *names), lines))
    return "\n".join(parts)


def _lost(log: Sequence[Mapping[str, Any]]) -> str:
    losses = series(log, "loss")
    bad = [step for step, value in losses if not math.isfinite(value)]
    if not bad:
        return ""
    return note(
        f"{len(bad)} of {len(losses)} logged losses are not finite, the first at step {bad[0]}; "
        "they are not drawn."
    )


def render_html(outcome: Outcome, log: Sequence[Mapping[str, Any]], png: bytes) -> str:
    """The report: everything in one file, no script and nothing to fetch."""
    config = outcome.config
    title = f"{config.get('method', 'run')} on {config.get('model', 'a model')}: {config.get('task', '')}".rstrip(
        ": "
    )
    caption = "Training loss as logged, faintly, and its moving average."
    if finite(series(log, "eval_loss")):
        caption += " The held-out loss is of training rows that were kept aside."
    settings = [(name, "none" if value is None else str(value)) for name, value in config.items()]
    body = "\n".join(
        part
        for part in (
            "<h1>Training run</h1>",
            note(title),
            note("Interrupted before the end.") if outcome.interrupted else "",
            table(("figure", "value"), figures(outcome)),
            note(f"Memory: {outcome.memory.method}."),
            _scores(outcome),
            "<h2>Loss</h2>",
            image(png, "Training loss by step"),
            note(caption),
            _lost(log),
            "<h2>Settings</h2>",
            table(("name", "value"), settings),
            "<h2>Versions</h2>",
            table(("name", "value"), list((outcome.versions or versions()).items())),
        )
        if part
    )
    return page(title, body)


def write_run_report(
    folder: Path, outcome: Outcome, log: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write ``loss.png`` and ``report.html`` to ``folder``, each in one step.

    Args:
        log: the entries of ``log.jsonl``; an empty one, of a run that was interrupted at once,
            gives a report too. Where it has no losses those of ``outcome`` are drawn.

    Returns:
        The paths written.
    """
    if not series(log, "loss"):
        log = [*log, *({"step": step, "loss": loss} for step, loss in outcome.losses)]
    png = run_curves(log)
    page_text = render_html(outcome, log, png)
    return [write_bytes(folder / PICTURE, png), write_text(folder / PAGE, page_text)]
