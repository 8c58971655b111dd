"""Fixtures of the CUDA kernels' tests."""

from __future__ import annotations

import pytest

import reft_kernels as rk


@pytest.fixture
def cuda_backend():
    with rk.backend("cuda"):
        yield
