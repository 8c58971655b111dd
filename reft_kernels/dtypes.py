"""The one rule of dtypes: in what the engine sums."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over ``dtype`` values are carried: fp64 stays, everything else is
    fp32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
