"""Which tokens of a batch a training forward needs, and the batch without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reft_kernels.positions import IGNORED_LABEL, first_tokens

_READ = ("input_ids", "labels", "attention_mask", "position_ids", "prompt_lengths")
_HARMLESS = ("num_items_in_batch",)
_CHANGES_OUTPUT = (
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "logits_to_keep",
)


class TrainingRows(NamedTuple):
    """A padded batch, read for its real tokens; token t of row i is in column ``starts[i] + t``.

    Attributes:
        ids, labels, positions: int64 ``[B, T]``, as in the call.
        supervised: bool ``[B, T]``, whether the next token has a label.
        starts: int64 ``[B]``, first real column of each row.
        counts: int64 ``[B]``, number of real tokens.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    supervised: Tensor
    starts: Tensor
    counts: Tensor

    def first_needed(self, edited: Sequence[Tensor | None]) -> Tensor:
        """Index of the first token that is edited or whose next token has a label, int64 ``[B]``.

        At least one token of each row is needed.

        Args:
            edited: int32 ``[N]`` each, edited rows of ``[B * T]``, -1 is skipped; None: all.
        """
        flat = self.supervised.flatten().clone()
        for rows in edited:
            if rows is None:
                return torch.zeros_like(self.starts)
            flat[rows[rows >= 0].long()] = True
        needed = flat.view_as(self.supervised)
        first = needed.to(torch.uint8).argmax(1) - self.starts
        first = torch.where(needed.any(1), first, self.counts)
        return torch.minimum(first.clamp(min=0), self.counts - 1)

    def tokens(self, values: Tensor, begin: Tensor, size: Tensor, fill: int) -> Tensor:
        """Tokens ``begin`` to ``begin + size`` of each row's values, padded on the right."""
        columns = torch.arange(int(size.max()), device=values.device)
        index = (self.starts + begin).unsqueeze(1) + columns
        taken = values.gather(1, index.clamp(max=values.shape[1] - 1))
        return taken.where(columns < size.unsqueeze(1), fill)

    @property
    def real(self) -> Tensor:
        """Mask of the real tokens, bool ``[B, T]``."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        ends = self.starts + self.counts
        return (columns >= self.starts.unsqueeze(1)) & (columns < ends.unsqueeze(1))

    def subset(self, index: Tensor) -> TrainingRows:
        """Some rows of the batch."""
        return TrainingRows(*(values[index] for values in self))


def read_rows(arguments: Mapping[str, Any]) -> TrainingRows | None:
    """Read the arguments of a training forward.

    Returns:
        None if the batch has no labels ``[B, T]``, no token ids, is packed or padded inside of its
        rows, or if an argument asks for more outputs or is not known here.
    """
    ids, labels = arguments.get("input_ids"), arguments.get("labels")
    if not (isinstance(ids, Tensor) and isinstance(labels, Tensor)):
        return None
    if ids.dim() != 2 or labels.shape != ids.shape or not ids.numel():
        return None
    others = [v for k, v in arguments.items() if k not in (*_READ, *_HARMLESS)]
    if any(isinstance(v, Tensor) and v.dim() for v in others):
        return None
    if any(arguments.get(name) for name in _CHANGES_OUTPUT):
        return None
    if arguments.get("past_key_values") is not None or arguments.get("return_dict") is False:
        return None
    if arguments.get("ignore_index", IGNORED_LABEL) != IGNORED_LABEL:
        return None
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if mask is None:
        if positions is not None:
            return None  # packed
        real = torch.ones_like(ids, dtype=torch.bool)
    elif not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    else:
        real = mask != 0
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    elif not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return None
    labelled = labels != IGNORED_LABEL
    supervised = torch.nn.functional.pad(labelled[:, 1:], (0, 1))
    rows = TrainingRows(ids, labels, positions, supervised, first_tokens(real), real.sum(1))
    unusable = (real != rows.real) | (~real & (labelled | supervised))
    return None if bool(unusable.any() | (rows.counts == 0).any()) else rows
