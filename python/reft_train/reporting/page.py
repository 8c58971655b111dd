"""Tables for the terminal and for a self-contained page, and figures as PNG without a display."""

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
    """Aligned columns: the first one to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row))
    # plain text however wide: a terminal wraps it, a file keeps it
    console = Console(file=io.StringIO(), width=10_000, markup=False, highlight=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table, its cells escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def facts(values: dict[str, Any]) -> str:
    """A table of names and values; None is shown as none."""
    rows = [(name, "none" if value is None else value) for name, value in values.items()]
    return table(("name", "value"), rows)


def note(text: str) -> str:
    """A paragraph, escaped."""
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading, escaped."""
    return f"<h2>{escape(text)}</h2>"


def image(png: bytes, alt: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def write_page(path: Path, title: str, *parts: str) -> Path:
    """A page that fetches nothing; ``title`` is escaped, ``parts`` are HTML."""
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return write_text(
        path, f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    )


def new_figure(*size: float) -> Figure:
    """An empty figure of ``size`` inches, without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size or (8, 4.5), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes, the same on every drawing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def smoothed(losses: Iterable[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total, norm, curve = 0.0, 0.0, []
    for loss in losses:
        total = weight * total + (1 - weight) * loss
        norm = weight * norm + (1 - weight)
        curve.append(total / norm)
    return curve
