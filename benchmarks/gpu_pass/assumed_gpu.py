"""Pytest plugin: collect the tests of a machine with a GPU on a machine without one.

    pytest -p benchmarks.gpu_pass.assumed_gpu --collect-only -m "gpu and not full"

It reports a GPU of compute capability 9.0 and a built CUDA library, so that test modules and
fixtures make the parameters that they make on a GPU. It refuses to run tests.
"""

from __future__ import annotations

import pytest
import torch

CAPABILITY = (9, 0)

torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device=None: CAPABILITY

from reft_kernels import cuda  # noqa: E402  (imports must see the GPU)

cuda._why_not_loaded = lambda: None  # type: ignore[assignment]


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run that would execute tests."""
    if not config.option.collectonly:
        raise pytest.UsageError("benchmarks.gpu_pass.assumed_gpu: needs --collect-only")
