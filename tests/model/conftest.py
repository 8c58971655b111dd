"""What tests of whole models share: the calls that build weights."""

from __future__ import annotations

import pytest

from reft_kernels import interventions


@pytest.fixture
def builds(monkeypatch) -> list:
    """The stacks that were called, in order."""
    called = []
    forward = interventions._Stacked.forward
    monkeypatch.setattr(
        interventions._Stacked, "forward", lambda self: called.append(self) or forward(self)
    )
    return called
