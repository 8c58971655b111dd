"""Runs all Python blocks of docs/peft.md, in order and in one namespace."""

from __future__ import annotations

import pytest

from tests.pages import DOCS, python_blocks, run_page

PAGE = DOCS / "peft.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(PAGE)
    assert len(blocks) >= 8 and sum("assert" in source for _, source in blocks) >= 6
    run_page(PAGE, {"__name__": "peft_page"})
