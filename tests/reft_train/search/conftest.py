"""Quick searches: no collection of garbage after a training that made none."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _leave_memory_alone(monkeypatch):
    monkeypatch.setattr("reft_train.search.study.clear_device_cache", lambda **options: None)
