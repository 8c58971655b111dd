"""Checks of the explicit arguments ``prompt_lengths`` and ``edit_positions``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.checks import describe


def repeat_examples(tensor: Tensor, batch: int, name: str) -> Tensor:
    """Repeat the entries of a tensor for beams and returned sequences.

    Args:
        tensor: ``[examples, ...]``.
        batch: batch size B, a multiple of the number of examples.
        name: argument name for the error message.

    Returns:
        ``[B, ...]``, each example repeated B / examples times.

    Raises:
        ValueError: B is not a multiple of the number of examples.
    """
    count = tensor.shape[0]
    if count == batch:
        return tensor
    if count == 0 or batch % count:
        raise ValueError(f"{name}: got {count} examples, expected {batch}")
    return tensor.repeat_interleave(batch // count, dim=0)


def explicit_lengths(
    value: Any, batch: int, limits: Tensor | int | None, device: torch.device
) -> Tensor:
    """Check ``prompt_lengths`` and convert it to int64 ``[B]``.

    Args:
        value: one integer per example: a sequence or an integer tensor ``[examples]``.
        batch: batch size B.
        limits: largest valid length, an int or int64 ``[B]``; None if later chunks may belong to
            the prompt.
        device: device of the result.

    Raises:
        ValueError: wrong shape or dtype, or a length out of range.
    """
    lengths = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(
            f"prompt_lengths: got {describe(lengths)}, expected one integer for each example, [B]"
        )
    lengths = repeat_examples(lengths.to(device=device, dtype=torch.int64), batch, "prompt_lengths")
    if not torch.compiler.is_compiling():
        wrong = lengths < 0 if limits is None else (lengths < 0) | (lengths > limits)
        if bool(wrong.any()):
            example = int(wrong.to(torch.int8).argmax())
            expected = "at least 0"
            if limits is not None:
                limit = limits if isinstance(limits, int) else int(limits[example])
                expected = f"0 to {limit}, the tokens it has"
            raise ValueError(
                f"prompt_lengths: got {int(lengths[example])} for example {example}, expected "
                f"{expected}"
            )
    return lengths
