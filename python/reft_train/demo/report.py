"""The files that a run leaves behind: loss curves as PNG, a self-contained HTML report, the
numbers as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from html import escape
from pathlib import Path

from reft_train.demo.datasets import Dataset
from reft_train.demo.results import Result, StepTimes
from reft_train.demo.settings import Settings
from reft_train.demo.table import HEADER
from reft_train.demo.variants import FROZEN, KERNELS, TITLES, TORCH
from reft_train.files import write_bytes, write_text
from reft_train.reporting.html import image, note, page, table
from reft_train.reporting.plots import new_figure, smoothed, to_png
from reft_train.reporting.versions import versions

# dashes, since the two LoReFTs' curves lie on one another
STYLES = {FROZEN: ("#7f7f7f", "-"), TORCH: ("#ff7f0e", "-"), KERNELS: ("#1f77b4", "--")}


def loss_curves(results: list[Result]) -> bytes:
    """A PNG of the smoothed training losses, with the raw ones behind."""
    figure = new_figure()
    axes = figure.subplots()
    for result in results:
        color, style = STYLES[result.name]
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(
            steps, smoothed(result.losses), color=color, linestyle=style, label=TITLES[result.name]
        )
    axes.set(xlabel="step", ylabel="training loss (cross entropy)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return to_png(figure)


def render_html(
    lines: list[tuple[str, ...]],
    notes: list[str],
    checks: list[str],
    dataset: Dataset,
    settings: Settings,
    png: bytes,
) -> str:
    """The report: everything in one file, no script and nothing to fetch."""
    train = Counter(example.label for example in dataset.train)
    held_out = Counter(example.label for example in dataset.held_out)
    counts = [(label, f"{train[label]:,}", f"{held_out[label]:,}") for label in dataset.labels]
    counts.append(("all", f"{len(dataset.train):,}", f"{len(dataset.held_out):,}"))
    facts = [(name, str(value)) for name, value in {**asdict(settings), **versions()}.items()]
    paragraphs = "".join(map(note, notes))
    items = "".join(f"<li>{escape(check)}</li>" for check in checks)
    body = f"""<h1>LoReFT on a frozen encoder</h1>
{table(HEADER, lines)}{paragraphs}<ul>{items}</ul>
<h2>Training loss</h2>{image(png, "Training loss of each variant by step")}
{note("Moving averages; the losses of single steps are drawn faintly behind them.")}
<h2>Data</h2><p>{escape(dataset.description)}</p>{table(("label", "to train on", "held out"), counts)}
<h2>Settings and versions</h2>{table(("name", "value"), facts)}"""
    return page("reft_train demo", body)


def write_report(
    folder: Path,
    results: list[Result],
    times: StepTimes,
    lines: list[tuple[str, ...]],
    notes: list[str],
    checks: list[str],
    dataset: Dataset,
    settings: Settings,
) -> list[Path]:
    """Write ``loss.png``, ``report.html`` and ``results.json`` to ``folder``, each in one step;
    their paths.
    """
    png = loss_curves(results)
    numbers = {
        "settings": asdict(settings),
        "versions": versions(),
        "data": {
            "description": dataset.description,
            "train": len(dataset.train),
            "held_out": len(dataset.held_out),
        },
        "majority_accuracy": dataset.majority_accuracy,
        "results": [asdict(result) for result in results],
        "step_times": asdict(times),
        "checks": checks,
    }
    return [
        write_bytes(folder / "loss.png", png),
        write_text(
            folder / "report.html", render_html(lines, notes, checks, dataset, settings, png)
        ),
        write_text(folder / "results.json", json.dumps(numbers, indent=1)),
    ]
