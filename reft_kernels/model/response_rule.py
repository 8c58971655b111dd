"""Where a response starts: after the last occurrence of a template in the text, and what labels say
about it.

Tensor operations on the tokens' device only; nothing here synchronises.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.positions import IGNORED_LABEL

Template = tuple[tuple[int, ...], ...]
"""Alternatives, each a sequence of token ids: any of them ends a prompt."""


class Occurrences(NamedTuple):
    """Where templates end.

    after: bool ``[B, T + 1]``, true at column c where an occurrence ends right before c.
    last: int64 ``[B]``, the largest such c of each example, 0 where there is none.
    """

    after: Tensor
    last: Tensor


def find_template(
    input_ids: Tensor, template: Template, segments: Tensor | None = None
) -> Occurrences:
    """Find every occurrence of a template.

    Args:
        input_ids: integers ``[B, T]``. template: the alternatives. segments: int64 ``[B, T]``; an
        occurrence lies within one segment (padding, a sequence of a packed batch). None: one.
    """
    batch, width = input_ids.shape
    after = torch.zeros(batch, width + 1, dtype=torch.bool, device=input_ids.device)
    for ids in template:
        count = len(ids)
        if count > width:
            continue
        hits = torch.ones(batch, width - count + 1, dtype=torch.bool, device=input_ids.device)
        for offset, token in enumerate(ids):
            hits = hits & (input_ids[:, offset : offset + width - count + 1] == token)
            if segments is not None:
                hits = hits & (
                    segments[:, offset : offset + width - count + 1]
                    == segments[:, : width - count + 1]
                )
        # an occurrence that starts at column c ends right before column c + count
        after = after | torch.nn.functional.pad(hits, (count, 0))
    columns = torch.arange(width + 1, device=input_ids.device)
    return Occurrences(after, (after * columns).amax(dim=1))


def supervised(labels: Tensor) -> Tensor:
    """Bool ``[B, T]``: the tokens that the loss is taken at."""
    return labels != IGNORED_LABEL


def supervised_spans(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Number of runs of supervised labels in each row, int64 ``[B]``.

    Args:
        starts: bool ``[B, T]``, true where a sequence of a packed batch starts, which starts a run
            anew; None: none.
    """
    return run_starts(labels, starts).sum(dim=1)


def run_starts(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Bool ``[B, T]``: the first token of each run of supervised labels."""
    chosen = supervised(labels)
    before = torch.nn.functional.pad(chosen, (1, 0))[:, :-1]
    return chosen & ~before if starts is None else chosen & (~before | starts)


def earlier_turn_is_supervised(found: Occurrences, labels: Tensor) -> Tensor:
    """Bool ``[B]``: a response that starts before the last one is supervised too."""
    columns = torch.arange(labels.shape[1], device=labels.device)
    earlier = found.after[:, :-1] & (columns < found.last.unsqueeze(1))
    return (earlier & supervised(labels)).any(dim=1)
