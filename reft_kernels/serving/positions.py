"""Edited positions of one sequence, as ranges of columns.

An engine computes a sequence in chunks: part of the prompt, the rest of it, one generated token
after the other, and all of it again after a preemption. The ranges depend on the prompt alone, so
that every chunk finds its edited tokens by intersection, and a generated token is edited only if
``positions`` is "all", however often it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from reft_kernels.positions import Spec

UNBOUNDED = 2**62
"""End of a range that has none."""


class EditedRange(NamedTuple):
    """Columns ``begin`` to ``end`` (exclusive), edited with weight set ``weight_set``."""

    begin: int
    end: int
    weight_set: int = 0


def edited_ranges(spec: Spec, untied: bool, prompt_length: int) -> tuple[EditedRange, ...]:
    """Return the edited columns of a sequence, in ascending order and without overlap.

    The same columns as those of :func:`reft_kernels.positions.prompt_rows`.

    Args:
        spec: The parsed positions.
        untied: Whether the last positions have weights of their own, set 1.
        prompt_length: Number of tokens of the prompt.
    """
    if spec.kind == "all":
        return (EditedRange(0, UNBOUNDED),)
    if spec.kind == "prompt":
        return (EditedRange(0, prompt_length),) if prompt_length else ()
    length = max(prompt_length - 1, 0) if spec.pyreft else prompt_length
    available = length // 2 if spec.halves else length
    first, last = min(spec.first, available), min(spec.last, available)
    ranges = (EditedRange(0, first), EditedRange(length - last, length, int(untied)))
    return tuple(r for r in ranges if r.end > r.begin)


def template_end(tokens: Sequence[int], template: Sequence[Sequence[int]]) -> int | None:
    """Return the column after the last occurrence of a response template.

    Args:
        tokens: The token ids of the prompt.
        template: Alternative sequences of token ids.

    Returns:
        None if no alternative occurs.
    """
    found = None
    for ids in template:
        sought, count = list(ids), len(ids)
        for end in range(len(tokens), count - 1, -1):
            if tokens[end - 1] == sought[-1] and list(tokens[end - count : end]) == sought:
                found = end if found is None else max(found, end)
                break
    return found


def covered(ranges: Sequence[EditedRange], begin: int, end: int) -> list[EditedRange]:
    """Return the parts of the ranges that lie in the columns ``begin`` to ``end`` (exclusive)."""
    parts = []
    for part in ranges:
        low, high = max(part.begin, begin), min(part.end, end)
        if low < high:
            parts.append(EditedRange(low, high, part.weight_set))
    return parts
