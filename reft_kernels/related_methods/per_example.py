"""Expansion of per-example values to the rows of an edit."""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.checks import describe, num_rows_of
from reft_kernels.dtypes import accumulation_dtype


def check_examples(hidden: Tensor) -> None:
    """Check that hidden states have a batch dimension.

    Raises:
        ValueError: If ``hidden`` is not ``[B, T, d]``.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden: got shape {tuple(hidden.shape)}, expected [B, T, d], whose examples are "
            "told apart"
        )


def example_ids(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Return the example number of each edited row.

    Args:
        hidden: ``[B, T, d]``.
        rows: int32 ``[N]`` or None for all rows.

    Returns:
        int64 ``[N]``; 0 for skipped entries.
    """
    length = hidden.shape[1]
    if rows is None:
        return torch.arange(num_rows_of(hidden), device=hidden.device) // max(length, 1)
    return rows.long().clamp(min=0) // max(length, 1)


def expand_per_example(
    name: str, values: Tensor | float, hidden: Tensor, rows: Tensor | None
) -> Tensor:
    """Expand values to one per edited row.

    Args:
        name: Argument name for error messages.
        values: A number, ``[B]`` (one value per example) or ``[N, 1]`` (one value per row).
        hidden: ``[B, T, d]``, or ``[..., d]`` unless ``values`` is ``[B]``.
        rows: int32 ``[N]`` or None for all rows.

    Returns:
        ``[N, 1]`` in fp32 (fp64 for fp64 ``hidden``), differentiable with respect to ``values``.

    Raises:
        TypeError: If ``values`` is neither a number nor a floating-point tensor.
        ValueError: If it has the wrong shape or device.
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
