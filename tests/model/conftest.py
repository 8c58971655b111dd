"""Fixtures for tests of whole models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from reft_kernels.interventions import STACKED


@pytest.fixture
def builds() -> Iterator[list[nn.Module]]:
    """The stacked interventions whose weights were built, in order of the calls."""
    called: list[nn.Module] = []

    def record(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(module, tuple(STACKED.values())):
            called.append(module)

    handle = register_module_forward_hook(record)
    yield called
    handle.remove()
