"""Tables for terminals and HTML pages, and figures as PNG without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; }
table { border-collapse: collapse; } img { max-width: 100%; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }"""


def text_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format aligned columns, the first one left-aligned, the others right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    # plain text of any width, since output may go to a file
    console = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Format an HTML table with escaped cells."""

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def facts(values: dict[str, Any]) -> str:
    """Format a table of names and values; None is shown as "none"."""
    rows = [(name, "none" if value is None else value) for name, value in values.items()]
    return table(("name", "value"), rows)


def note(text: str) -> str:
    """Format an escaped paragraph."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """Format an escaped section heading."""
    return f"<h2>{escape(text)}</h2>"


def image(png: bytes, alt: str) -> str:
    """Format an image embedded in the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def write_page(path: Path, title: str, *parts: str) -> Path:
    """Write a self-contained page; ``title`` is escaped, ``parts`` are HTML."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return write_text(
        path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    )


def new_figure(*size: float) -> Figure:
    """Create an empty figure of ``size`` inches without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size or (8, 4.5), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """Render the figure as PNG bytes, reproducibly."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def smoothed(losses: Iterable[float], weight: float = 0.9) -> list[float]:
    """Return the bias-corrected exponential moving average."""
    total, norm, curve = 0.0, 0.0, []
    for loss in losses:
        total = weight * total + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        curve.append(total / norm)
    return curve
