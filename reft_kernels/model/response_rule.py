"""Finds where responses start: after the last response template, or at the first label.

All operations run on the tokens' device and do not synchronize.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.positions import IGNORED_LABEL

Template = tuple[tuple[int, ...], ...]
"""Alternative sequences of token ids; each of them ends a prompt."""


class Occurrences(NamedTuple):
    """The ends of a template's occurrences in a batch ``[B, T]``.

    Attributes:
        after: bool ``[B, T + 1]``, true at column c if an occurrence ends right before c.
        last: int64 ``[B]``, the largest such c of each example, 0 without an occurrence.
    """

    after: Tensor
    last: Tensor


def find_template(
    input_ids: Tensor, template: Template, segments: Tensor | None = None
) -> Occurrences:
    """Find all occurrences of a template.

    Args:
        input_ids: integer token ids ``[B, T]``.
        template: the alternative token sequences.
        segments: int64 ``[B, T]``, numbers of the sequences of a packed batch; occurrences that
            span several segments are ignored. None: each row is one segment.
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
    """Mask of the labels that contribute to the loss, bool ``[B, T]``."""
    return labels != IGNORED_LABEL


def supervised_spans(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Number of runs of supervised labels in each row, int64 ``[B]``.

    Args:
        labels: int64 ``[B, T]``.
        starts: bool ``[B, T]``, true where a sequence of a packed batch starts; a run ends there.
    """
    return run_starts(labels, starts).sum(dim=1)


def run_starts(labels: Tensor, starts: Tensor | None = None) -> Tensor:
    """Mask of the first token of each run of supervised labels, bool ``[B, T]``.

    The arguments are those of :func:`supervised_spans`.
    """
    chosen = supervised(labels)
    before = torch.nn.functional.pad(chosen, (1, 0))[:, :-1]
    return chosen & ~before if starts is None else chosen & (~before | starts)


def earlier_turn_is_supervised(occurrences: Occurrences, labels: Tensor) -> Tensor:
    """Whether a response before the last one has labels, bool ``[B]``.

    Args:
        occurrences: the response templates of the batch.
        labels: int64 ``[B, T]``.
    """
    columns = torch.arange(labels.shape[1], device=labels.device)
    earlier = occurrences.after[:, :-1] & (columns < occurrences.last.unsqueeze(1))
    return (earlier & supervised(labels)).any(dim=1)
