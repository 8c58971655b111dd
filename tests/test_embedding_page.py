"""docs/embedding.md: every Python block runs, in order, in one namespace, and each asserts something."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent / "docs" / "embedding.md"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks() -> list[tuple[int, str]]:
    """Each block with the line of the page at which it starts."""
    text = PAGE.read_text(encoding="utf-8")
    return [(text[: match.start(1)].count("\n"), match[1]) for match in _BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_block_runs():
    blocks = _blocks()
    assert len(blocks) >= 10
    namespace = {"__name__": "embedding_page"}
    for line, source in blocks:
        # empty lines in front, so that an error names the page's own line
        exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)


def test_every_block_asserts_and_is_short():
    for line, source in _blocks():
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source))), f"line {line}: nothing is asserted"
        assert len(source.splitlines()) <= 16, f"line {line}: a block of {len(source.splitlines())} lines"


def test_fences_are_balanced_and_lines_fit():
    text = PAGE.read_text(encoding="utf-8")
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences[::2] == ["```python"] * len(_blocks()) and set(fences[1::2]) == {"```"}
    assert max(len(line) for line in text.splitlines()) <= 128
