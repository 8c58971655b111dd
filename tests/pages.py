"""Functions that run the Python blocks of a documentation page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return the source of each block, with the number of lines before it on the page."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in _BLOCK.finditer(text)]


def run_page(page: Path, namespace: dict[str, Any]) -> None:
    """Run all blocks of a page in order, in one namespace."""
    for line, source in python_blocks(page):
        # leading empty lines, so that line numbers in errors are those of the page
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
