"""The default folder of what can be made again."""

from __future__ import annotations

from pathlib import Path

import pytest
from reft_train.files import default_cache


@pytest.mark.parametrize(
    "value, expected", [("/somewhere", "/somewhere/reft_train"), ("", "/home/me/.cache/reft_train")]
)
def test_the_default_cache_follows_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert default_cache() == Path(expected)
