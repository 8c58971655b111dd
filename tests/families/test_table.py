"""docs/families.md matches the files of results, and no family fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.families import table
from tests.families.catalogue import FAMILIES

DOCS = Path(__file__).resolve().parents[2] / "docs"
FILES = sorted((DOCS / "families").glob("transformers-*.json"))


def test_the_page_is_drawn_from_the_files():
    assert (DOCS / "families.md").read_text() == table.page(DOCS / "families")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_files_have_every_family_and_no_failure(path):
    results = json.loads(path.read_text())["families"]
    assert set(results) == set(FAMILIES)
    failing = {name: r for name, r in results.items() if r["verdict"].startswith("fails")}
    assert not failing


def test_a_hanging_and_a_crashing_family_get_a_verdict(monkeypatch):
    monkeypatch.setattr(table, "verdict", lambda family: time.sleep(60))
    assert table.in_a_child(FAMILIES["llama"], 1)["note"] == "no end within 1 s"
    monkeypatch.setattr(table, "verdict", lambda family: os.kill(os.getpid(), signal.SIGKILL))
    assert table.in_a_child(FAMILIES["llama"], 5)["note"] == "ended by signal 9"
