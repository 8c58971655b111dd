"""docs/peft.md: every Python block runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peft.md"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = [(text[: m.start(1)].count("\n"), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M)]
    assert len(blocks) >= 8 and sum("assert" in source for _, source in blocks) >= 6
    namespace = {"__name__": "peft_page"}
    for line, source in blocks:  # empty lines in front, so that an error names the page's own line
        exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)
