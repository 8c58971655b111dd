"""Collators that pad items of different lengths, or pack several of them into one row.

Position ids of packed rows restart at 0 with each example and no attention mask is passed, so
transformers' models keep tokens of different examples apart, and the engine finds each example's
prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening

from reft_train.data.tokenizing import IGNORED
from reft_train.errors import wrong
from reft_train.models import bare, evaluating

Items = Sequence[Mapping[str, Any]]
FILLING = 0.05  # fraction of filler tokens accepted in short rows
_PROBES = (9, 5, 7, 12)  # token counts of the test sequences


@dataclass(frozen=True)
class PaddingCollator:
    """Collate items into ``input_ids``, ``attention_mask``, and what else they have.

    That is ``token_type_ids``, and ``labels``: of every token, or ``[B]`` int64 classes or float32
    targets of texts to classify.

    Args:
        pad_id: padding value of ``input_ids``; labels are padded with -100.
        side: padding side: "right", or "left" for generation.
    """

    pad_id: int
    side: str = "right"

    def __call__(self, items: Items) -> dict[str, Tensor]:
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._padded(ids, self.pad_id),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
        }
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = self._padded([item["token_type_ids"] for item in items], 0)
        if "labels" in items[0]:
            labels = [item["labels"] for item in items]
            numbers = isinstance(labels[0], int | float)
            batch["labels"] = torch.tensor(labels) if numbers else self._padded(labels, IGNORED)
        return batch

    def _padded(self, rows: Sequence[Sequence[int]], value: int) -> Tensor:
        tensors = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        options = {"padding_value": value, "padding_side": self.side}
        return pad_sequence(tensors, batch_first=True, **options)


class PackingCollator(DataCollatorWithFlattening):
    """Collate causal items into ``input_ids``, ``labels`` and ``position_ids`` ``[n, T]``.

    Each row is a flattened batch of transformers. Its end is filled with a separate sequence whose
    labels are all -100. ``use_cache`` is False because with a cache the model would not build the
    mask from the position ids.

    Args:
        row_length: target tokens of a row. Rows are shorter if shorter rows can be filled
            (:func:`packed_rows`), and longer if examples do not divide evenly.
        pad_id: filler token.
        flat: return one row ``[1, M]`` without filler, and the boundaries for flash attention.
    """

    def __init__(self, row_length: int, pad_id: int, flat: bool = False) -> None:
        super().__init__(return_flash_attn_kwargs=flat, separator_id=IGNORED)
        self.row_length, self.pad_id, self.flat = row_length, pad_id, flat

    def __call__(self, features: Sequence[Mapping[str, Any]], *args: Any) -> dict[str, Any]:
        items = [{name: item[name] for name in ("input_ids", "labels")} for item in features]
        if self.flat:
            return {**super().__call__(items), "use_cache": False}
        lengths = [len(item["input_ids"]) for item in items]
        rows = packed_rows(lengths, self.row_length)
        width = max(sum(lengths[index] for index in row) for row in rows)
        flattened = []
        for row in rows:
            # the filler counts as a prompt: its edits affect no other token and no loss
            count = width - sum(lengths[index] for index in row)
            filler = {"input_ids": [self.pad_id] * count, "labels": [IGNORED] * count}
            packed = [*(items[index] for index in row), *([filler] if count else [])]
            flattened.append(super().__call__(packed))
        names = ("input_ids", "labels", "position_ids")
        batch = {name: torch.cat([row[name] for row in flattened]) for name in names}
        return {**batch, "use_cache": False}


def packed_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Assign examples to rows, using the shortest row length with at most ``FILLING`` filler.

    Attention costs as much for a packed row as for one long example, so short examples go into
    short rows. If no length reaches that, rows have ``row_length`` tokens.
    """
    fewest = -(-sum(lengths) // row_length)
    for count in range(len(lengths), fewest, -1):
        rows = balanced(lengths, count)
        width = max(sum(lengths[index] for index in row) for row in rows)
        if width <= row_length and count * width <= (1 + FILLING) * sum(lengths):
            return rows
    return balanced(lengths, fewest)


def balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Assign examples to at most ``count`` rows, longest first, each to the least filled row."""
    rows: list[list[int]] = [[] for _ in range(min(len(lengths), count))]
    totals = [(0, number) for number in range(len(rows))]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, emptiest = totals[0]
        rows[emptiest].append(index)
        heapq.heapreplace(totals, (total + lengths[index], emptiest))
    return rows


def check_model_packs(model: nn.Module, pad_id: int, flat: bool = False) -> None:
    """Raise UserError if a model attends across packed sequences.

    The logits of random sequences must stay the same bit for bit when the tokens of the sequence
    packed before them change.

    Args:
        model: on its device, in its training dtype. The modes of its modules are not changed.
    """
    embedding = model.get_input_embeddings().weight
    known = torch.tensor([i for i in range(min(embedding.shape[0], 1000)) if i != pad_id])
    draws = torch.randint(len(known), (2, sum(_PROBES)), generator=torch.Generator().manual_seed(0))
    draws[1, _PROBES[0] :] = draws[0, _PROBES[0] :]
    collate, apart, reason = DataCollatorWithFlattening(return_flash_attn_kwargs=flat), False, None

    def later_logits(ids: Tensor) -> Tensor:
        parts = [part.tolist() for part in ids.split(_PROBES)]
        batch = collate([{"input_ids": p, "labels": [IGNORED] * 3 + p[3:]} for p in parts])
        batch = {
            k: v.to(embedding.device) if isinstance(v, Tensor) else v for k, v in batch.items()
        }
        found = getattr(model(**batch, use_cache=False, return_dict=True), "logits", None)
        if found is None or found.shape[:2] != batch["input_ids"].shape:
            raise TypeError("the model does not return logits of every token")
        return found[:, _PROBES[0] :]

    with evaluating(model):
        try:
            first, second = map(later_logits, known[draws])
            apart = torch.equal(first, second)  # also False for NaN
        except (TypeError, ValueError) as refused:  # the model does not accept the arguments
            reason = refused
    if not apart:
        what = f"a {type(bare(model)).__name__}, which does not keep packed sequences apart"
        expected = "a causal language model whose attention follows position ids"
        raise wrong("--packing", what, expected) from reason
