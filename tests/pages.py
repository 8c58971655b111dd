"""Pages of the documentation as programs: their Python blocks, run in order in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Each block with the line of the page at which it starts."""
    text = page.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in _BLOCK.finditer(text)]


def run_page(page: Path, namespace: dict[str, Any]) -> None:
    """Run every block of a page."""
    for line, source in python_blocks(page):
        # empty lines in front, so that an error names the page's own line
        exec(compile("\n" * line + source, str(page), "exec"), namespace)
