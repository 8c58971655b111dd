"""Tests of docs/embedding.md.

Every Python block runs, in order and in one namespace, and contains an assertion.
"""

from __future__ import annotations

import ast

import pytest
import torch

from tests.pages import DOCS, python_blocks, run_page

PAGE = DOCS / "embedding.md"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_every_block_runs():
    assert len(python_blocks(PAGE)) >= 10
    run_page(PAGE, {"__name__": "embedding_page"})


def test_every_block_asserts_and_is_short():
    for line, source in python_blocks(PAGE):
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source))), (
            f"line {line}: nothing is asserted"
        )
        assert len(source.splitlines()) <= 16, (
            f"line {line}: a block of {len(source.splitlines())} lines"
        )


def test_fences_are_balanced_and_lines_fit():
    text = PAGE.read_text(encoding="utf-8")
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences[::2] == ["```python"] * len(python_blocks(PAGE)) and set(fences[1::2]) == {"```"}
    assert max(len(line) for line in text.splitlines()) <= 128
