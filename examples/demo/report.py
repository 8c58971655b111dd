"""What the demo prints and writes: answers side by side, tables, a figure, numbers."""

from __future__ import annotations

import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pandas
from matplotlib.figure import Figure
from reft_train import reporting
from reft_train.files import dumps, write_text

CHATS = ("question", "frozen model", "with LoReFT")
STEPS = ("training step", "trained numbers", "time / frozen", "memory over weights")


def _steps(measured: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for title, one in measured.items():
        if "missing" in one:
            rows.append((title, one["missing"], "-", "-"))
        else:
            figures = (f"{one['trained']:,}", f"{one['ratio']:.2f}", f"{one['memory']:,.0f} MiB")
            rows.append((title, *figures))
    return rows


def _notes(results: dict[str, Any]) -> list[str]:
    adapter, losses, scores = results["adapter"], results["losses"], results["docstrings"]
    spread = {
        name: f"{share:.1%} \u00b1 {math.sqrt(share * (1 - share) / scores['texts']):.1%}"
        for name, share in ((name, scores[name]) for name in ("frozen", "LoReFT"))
    }
    return [
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps; the adapter has "
        f"{adapter['trained']:,} numbers ({adapter['share']:.4%} of the model's) in "
        f"{adapter['bytes']:,} bytes",
        "answers of the trained model and of the saved adapter in a fresh model: "
        + ("identical" if results["reloaded"] else "DIFFERENT"),
        f"which of {scores['packages']} packages is a docstring from, {scores['texts']} of modules "
        f"held out, answered in the chat: frozen {spread['frozen']}, LoReFT {spread['LoReFT']}, "
        f"guessing {1 / scores['packages']:.1%} (\u00b1: binomial standard error)",
    ]


def draw(results: dict[str, Any]) -> Figure:
    """Draw the answers side by side, in rows as high as their lines, and the loss."""
    widths = (34, 52, 52)  # letters
    pairs = [zip(chat, widths, strict=True) for chat in results["chats"]]
    rows = [[textwrap.fill(text, width) for text, width in pair] for pair in pairs]
    lines = [1, *(1 + max(text.count("\n") for text in row) for row in rows)]
    heights = [0.15 + 0.14 * count for count in lines]  # inches
    # without pyplot: no display, no global state
    figure = Figure(figsize=(11, sum(heights) + 2.8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[sum(heights), 2.8])
    texts, curve = above.add_axes((0.01, 0.01, 0.98, 0.98)), below.subplots()
    texts.axis("off")
    parts = [width / sum(widths) for width in widths]
    table = texts.table(rows, colLabels=CHATS, colWidths=parts, cellLoc="left", bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_height(heights[row])  # with bbox: a share of the whole
        cell.PAD = 0.03
        cell.set_edgecolor("#dddddd")
        cell.get_text().set_parse_math(False)
    curve.plot(range(1, len(results["losses"]) + 1), results["losses"])
    curve.set(xlabel="step", ylabel="training loss")
    return figure


def print_chats(chats: list[tuple[str, str, str]]) -> None:
    """Print the answers side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*CHATS, show_lines=True)
    for chat in chats:
        table.add_row(*map(Text, chat))
    Console().print(table)


def write(out: Path, results: dict[str, Any]) -> None:
    """Print the results, and write ``demo.json`` and ``demo.png``."""
    learned, reloaded, scored = _notes(results)
    steps = pandas.DataFrame(_steps(results["steps"]), columns=STEPS).to_string(index=False)
    print(learned, reloaded, "", steps, "", scored, sep="\n")
    write_text(out / "demo.json", dumps({"versions": reporting.versions(), **results}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks it: drawn as a box
        draw(results).savefig(out / "demo.png", dpi=110)
