"""Tables for terminals, HTML pages, figures without a display, and the versions in use."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterable, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_kernels.version import __version__
from reft_train.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; }
table { border-collapse: collapse; } img { max-width: 100%; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: left; }"""
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")
Table = tuple[Sequence[object], Iterable[Sequence[object]]]


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


def _html(part: str | bytes | dict[str, Any] | Table) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    if isinstance(part, bytes):
        return f'<img alt="figure" src="data:image/png;base64,{base64.b64encode(part).decode()}">'
    header, rows = (("name", "value"), part.items()) if isinstance(part, dict) else part

    def line(cells: Iterable[object], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def write_page(path: Path, title: str, sections: dict[str, Sequence[Any]]) -> Path:
    """Write a self-contained HTML page.

    Args:
        sections: parts under each heading: a paragraph (str), a PNG (bytes), names and values
            (dict), or a table (header, rows). All text is escaped.
    """
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    body = [f"<h1>{escape(title)}</h1>"]
    for heading, parts in sections.items():
        body += [f"<h2>{escape(heading)}</h2>", *map(_html, parts)] if parts else []
    content = f'<html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>'
    return write_text(path, f"<!doctype html>{content}")


def new_figure(*size: float) -> Figure:
    """Create an empty figure of ``size`` inches without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size or (8, 4.5), layout="constrained")


def to_png(figure: Figure) -> bytes:
    """Render the figure as PNG bytes, reproducibly."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential moving average with weight 0.9."""
    import pandas

    return pandas.Series(losses).ewm(alpha=0.1).mean().tolist()


def installed(package: str) -> str:
    """Return a package's version, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform, :data:`PACKAGES` and reft_kernels."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, **{name: installed(name) for name in PACKAGES}, "reft_kernels": __version__}
