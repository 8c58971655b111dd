"""One number for each example, expand_per_example over the rows of an edit."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.checks import describe, num_rows_of
from reft_kernels.dtypes import accumulation_dtype


def check_examples(hidden: Tensor) -> None:
    """Refuse a hidden state without examples.

    Raises:
        ValueError: ``hidden`` is not ``[B, T, d]``.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected [B, T, d], whose examples are "
            "told apart"
        )


def example_ids(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """The example of each edited row, int64 ``[N]``, for ``hidden [B, T, d]``; 0 for a skipped
    entry.
    """
    length = hidden.shape[1]
    if rows is None:
        return torch.arange(num_rows_of(hidden), device=hidden.device) // max(length, 1)
    return rows.long().clamp(min=0) // max(length, 1)


def expand_per_example(
    name: str, values: Tensor | float, hidden: Tensor, rows: Tensor | None
) -> Tensor:
    """A float, ``[B]`` (one value for each example of ``hidden [B, T, d]``) or ``[N, 1]`` (for each
    row) as ``[N, 1]``.

    Returns:
        ``[N, 1]`` in fp32 (fp64 for fp64 ``hidden``), differentiable with respect to ``values``.

    Raises:
        TypeError: not a number and not a floating-point tensor. ValueError: another shape or
            device.
    """
    count = num_rows_of(hidden) if rows is None else rows.shape[0]
    dtype = accumulation_dtype(hidden.dtype)
    if isinstance(values, int | float) and not isinstance(values, bool):
        return torch.full((count, 1), float(values), dtype=dtype, device=hidden.device)
    if not isinstance(values, Tensor) or not values.dtype.is_floating_point:
        raise TypeError(
            f"{name}: got {describe(values)}, expected a number or a floating-point tensor [B] or "
            "[N, 1]"
        )
    if values.device != hidden.device:
        raise ValueError(
            f"{name}: got device {values.device}, expected {hidden.device}, where hidden is"
        )
    if values.shape == (count, 1):
        return values.to(dtype)
    batch = hidden.shape[0] if hidden.dim() == 3 else None
    if values.shape != (batch,):
        raise ValueError(
            f"{name}: got shape {tuple(values.shape)}, expected ({batch},) for each example of "
            "hidden [B, T, d] "
            f"or ({count}, 1) for each row"
        )
    return values.to(dtype).index_select(0, example_ids(hidden, rows)).unsqueeze(1)
