"""Checks of the arguments by which a caller states the prompts of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.checks import describe


def repeat_examples(tensor: Tensor, batch: int, name: str) -> Tensor:
    """One entry for each example as one for each row of the batch: beams and returned sequences
    repeat theirs.
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
    """``prompt_lengths`` as int64 ``[B]``, checked.

    Args:
        limits: the most tokens that each example's prompt can have; None: no limit, a part of the
            prompt is still to come.
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
