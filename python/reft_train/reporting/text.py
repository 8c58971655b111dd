"""A table as aligned text, for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """The header, a rule and the lines; first column to the left, the others to the right."""
    rows = [tuple(header), *map(tuple, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def show(row: tuple[str, ...]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([show(rows[0]), rule, *map(show, rows[1:])])
