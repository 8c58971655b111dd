"""Pieces of a self-contained page: no script, nothing to fetch, every text escaped."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .3em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } .note { color: #555; font-size: .9em; }
"""


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, its cells escaped."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(header, "th") + "".join(row(line, "td") for line in lines) + "</table>"


def note(text: str) -> str:
    """A paragraph in small print, escaped."""
    return f'<p class="note">{escape(text)}</p>'


def image(png: bytes, alt: str = "") -> str:
    """A picture inside the page; ``alt`` is escaped."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, body: str) -> str:
    """The whole page: ``title`` is escaped, ``body`` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style></head><body>
{body}
</body></html>
"""
