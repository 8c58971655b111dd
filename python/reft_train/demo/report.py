"""The files that a run leaves behind: loss curves as PNG, a self-contained HTML report, the numbers as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from reft_train.demo.datasets import Dataset
from reft_train.demo.results import Result, StepTimes
from reft_train.demo.settings import Settings
from reft_train.demo.table import HEADER
from reft_train.demo.variants import FROZEN, KERNELS, TITLES, TORCH
from reft_train.files import write_bytes, write_text

# dashes, since the two LoReFTs' curves lie on one another
STYLES = {FROZEN: ("#7f7f7f", "-"), TORCH: ("#ff7f0e", "-"), KERNELS: ("#1f77b4", "--")}
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } .note { color: #555; font-size: .9em; }
"""


def smoothed(losses: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, curve = 0.0, 0.0, []
    for loss in losses:
        total = weight * total + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        curve.append(total / norm)
    return curve


def loss_curves(results: list[Result]) -> bytes:
    """A PNG of the smoothed training losses, with the raw ones behind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # drawn without pyplot, so no display and no global state
    axes = figure.subplots()
    for result in results:
        color, style = STYLES[result.name]
        steps = range(1, len(result.losses) + 1)
        axes.plot(steps, result.losses, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(steps, smoothed(result.losses), color=color, linestyle=style, label=TITLES[result.name])
    axes.set(xlabel="step", ylabel="training loss (cross entropy)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "transformers", "peft", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    import reft_kernels

    found["reft_kernels"] = reft_kernels.__version__
    return found


def _table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    def row(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(line, "td") for line in lines) + "</table>"


def render_html(
    table: list[tuple[str, ...]], notes: list[str], checks: list[str], dataset: Dataset, settings: Settings, png: bytes
) -> str:
    """The report: everything in one file, no script and nothing to fetch."""
    train = Counter(example.label for example in dataset.train)
    held_out = Counter(example.label for example in dataset.held_out)
    counts = [(label, f"{train[label]:,}", f"{held_out[label]:,}") for label in dataset.labels]
    counts.append(("all", f"{len(dataset.train):,}", f"{len(dataset.held_out):,}"))
    image = base64.b64encode(png).decode()
    facts = [(name, str(value)) for name, value in {**asdict(settings), **versions()}.items()]
    paragraphs = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    items = "".join(f"<li>{html.escape(check)}</li>" for check in checks)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>reft_train demo</title><style>{_CSS}</style></head><body>
<h1>LoReFT on a frozen encoder</h1>
{_table(HEADER, table)}{paragraphs}<ul>{items}</ul>
<h2>Training loss</h2><img alt="Training loss of each variant by step" src="data:image/png;base64,{image}">
<p class="note">Moving averages; the losses of single steps are drawn faintly behind them.</p>
<h2>Data</h2><p>{html.escape(dataset.description)}</p>{_table(("label", "to train on", "held out"), counts)}
<h2>Settings and versions</h2>{_table(("name", "value"), facts)}
</body></html>
"""


def write_report(
    folder: Path,
    results: list[Result],
    times: StepTimes,
    table: list[tuple[str, ...]],
    notes: list[str],
    checks: list[str],
    dataset: Dataset,
    settings: Settings,
) -> list[Path]:
    """Write ``loss.png``, ``report.html`` and ``results.json`` to ``folder``, each in one step; their paths."""
    png = loss_curves(results)
    numbers = {
        "settings": asdict(settings),
        "versions": versions(),
        "data": {"description": dataset.description, "train": len(dataset.train), "held_out": len(dataset.held_out)},
        "majority_accuracy": dataset.majority_accuracy,
        "results": [asdict(result) for result in results],
        "step_times": asdict(times),
        "checks": checks,
    }
    return [
        write_bytes(folder / "loss.png", png),
        write_text(folder / "report.html", render_html(table, notes, checks, dataset, settings, png)),
        write_text(folder / "results.json", json.dumps(numbers, indent=1)),
    ]
