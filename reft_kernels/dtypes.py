"""Accumulation dtype for each input dtype."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums of ``dtype`` values are accumulated.

    This is fp64 for fp64 and fp32 for every other dtype.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
