"""What the demo prints and writes: answers side by side, tables, a figure, numbers, a page."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any

from reft_train import reporting
from reft_train.config import RunConfig
from reft_train.files import dumps, write_bytes, write_text

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
    identical = "saved and loaded into a fresh model: the answers are identical"
    spread = {name: "{:.1%} \u00b1 {:.1%}".format(*scores[name]) for name in ("frozen", "LoReFT")}
    return [
        f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps; the adapter has "
        f"{adapter['trained']:,} numbers ({adapter['share']:.4%} of the model's) in "
        f"{adapter['bytes']:,} bytes",
        identical if results["reloaded"] else "FAILED: the reloaded adapter answers differently",
        f"which of {scores['packages']} packages is a docstring from, {scores['texts']} of modules "
        f"held out, answered in the chat: frozen {spread['frozen']}, LoReFT {spread['LoReFT']}, "
        f"guessing {1 / scores['packages']:.1%} (\u00b1: binomial standard error)",
    ]


def _figure(results: dict[str, Any]) -> bytes:
    """Draw the answers side by side, and the loss."""
    figure = reporting.new_figure(11, 2.5 + 1.1 * len(results["chats"]))
    texts, curve = figure.subplots(2, 1, height_ratios=[len(results["chats"]), 2])
    texts.axis("off")
    rows = [[textwrap.fill(cell, 46) for cell in row] for row in results["chats"]]
    table = texts.table(rows, colLabels=CHATS, colWidths=(0.24, 0.38, 0.38), cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_height(0.9 / len(rows) if row else 0.08)
        cell.set_edgecolor("#dddddd")
        cell.get_text().set_parse_math(False)
    curve.plot(range(1, len(results["losses"]) + 1), results["losses"])
    curve.set(xlabel="step", ylabel="training loss")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks it: drawn as a box
        return reporting.to_png(figure)


def print_chats(chats: list[tuple[str, str, str]]) -> None:
    """Print the answers side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*CHATS, show_lines=True)
    for chat in chats:
        table.add_row(*map(Text, chat))
    Console().print(table)


def write(out: Path, config: RunConfig, results: dict[str, Any], seconds: float) -> None:
    """Print the results, and write ``results.json``, ``demo.png`` and ``report.html``."""
    notes, steps = _notes(results), _steps(results["steps"])
    print(notes[0], notes[1], "", reporting.text_table(STEPS, steps), "", notes[2], sep="\n")
    names = ("model", "layers", "rank", "positions", "lr", "batch_size", "seed")
    settings = {name: getattr(config, name) for name in names} | reporting.versions()
    write_text(out / "results.json", dumps({"settings": settings, **results}))
    png = write_bytes(out / "demo.png", _figure(results)).read_bytes()
    sections = {
        "Before and after": [(CHATS, results["chats"]), *notes[:2]],
        "A training step": [(STEPS, steps)],
        "Held-out docstrings": notes[2:],
        "Figure": [png],
        "Settings": [settings],
    }
    reporting.write_page(out / "report.html", "A chat model with LoReFT", sections)
    print(f"{seconds:.0f} s; report: {out / 'report.html'}; to talk to it: make chat", flush=True)
