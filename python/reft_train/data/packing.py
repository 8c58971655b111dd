"""Several examples in one row, without padding between them.

Position ids start at 0 again with each example, and there is no attention mask: so transformers'
models keep tokens of different examples apart, and the engine finds each example's prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reft_train.data.tokenizing import IGNORED
from reft_train.errors import UserError
from reft_train.models import bare, evaluating

Items = Sequence[Mapping[str, Any]]
FILLING = 0.05  # part of the tokens that short rows may waste
_EXAMPLES_A_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_PROBES, _PROBE_ROW = (
    (9, 5, 7, 12),
    17,
)  # tokens of the sequences tried: two rows of two, one of them filled


@dataclass(frozen=True)
class PackingCollator:
    """Causal items as ``input_ids``, ``labels`` and ``position_ids`` ``[n, T]``.

    A row's end is filled by a sequence of its own, which nothing is learned from. The first label
    of each example is -100: it does not follow from the example before. ``use_cache`` is False
    since a cache would hide the position ids from the mask.

    Args:
        row_length: tokens of a row to aim at: rows are shorter where shorter ones are full as well
            (:func:`packed_rows`), and longer where examples do not divide evenly.
        pad_id: fills the ends of rows.
        flat: one row ``[1, M]`` without filling, and the boundaries that flash attention asks for.
    """

    row_length: int
    pad_id: int
    flat: bool = False

    def __post_init__(self) -> None:
        if self.row_length < 1:
            raise ValueError(f"row_length: got {self.row_length}, expected at least 1")

    def __call__(self, items: Items) -> dict[str, Any]:
        lengths = [len(item["input_ids"]) for item in items]
        rows = [list(range(len(items)))] if self.flat else packed_rows(lengths, self.row_length)
        width = max(sum(lengths[index] for index in row) for row in rows)
        ids = torch.full((len(rows), width), self.pad_id, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORED)
        positions = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            start = 0
            for index in row:
                place = slice(start, start + lengths[index])
                ids[number, place] = torch.as_tensor(items[index]["input_ids"], dtype=torch.int64)
                labels[number, place] = torch.as_tensor(items[index]["labels"], dtype=torch.int64)
                labels[number, start] = IGNORED
                positions[number, place] = torch.arange(lengths[index])
                start = place.stop
            # to the engine the filling is a prompt: edits there are seen by no other token and no
            # loss
            positions[number, start:] = torch.arange(width - start)
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
        if self.flat:
            ends, longest = (
                torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
                max(lengths),
            )
            batch |= {
                "cu_seq_lens_q": ends,
                "cu_seq_lens_k": ends,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return batch


def packed_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Indices of each row's examples: the shortest rows that are full but for ``FILLING``.

    Attention costs as much for a packed row as for one long example, so short examples go into
    short rows; where none are full, rows have ``row_length``.
    """
    longest = balanced(lengths, -(-sum(lengths) // row_length))
    for each in _EXAMPLES_A_ROW:
        count = -(-len(lengths) // each)
        if count <= len(longest):
            break
        rows = balanced(lengths, count)
        width = max(sum(lengths[index] for index in row) for row in rows)
        if width <= row_length and count * width <= (1 + FILLING) * sum(lengths):
            return rows
    return longest


def balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Indices in ``count`` rows, at most one for each: the longest first, into the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(min(len(lengths), count))]
    totals = [(0, number) for number in range(len(rows))]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, emptiest = totals[0]
        rows[emptiest].append(index)
        heapq.heapreplace(totals, (total + lengths[index], emptiest))
    return rows


def check_model_packs(model: nn.Module, pad_id: int, flat: bool = False) -> None:
    """Refuse a model that mixes packed sequences: random ones, alone and packed, must have the same
    logits.

    With eps of the model's dtype, ``rounding`` = eps * max|logits|, and ``leak`` what the logits
    change by where a mask lets every example see those before it, the largest difference allowed is
    sqrt(rounding * leak), half way in digits between what rounding and what a leak would make of
    it.

    Args:
        model: on its device, in the dtype it is trained in. Modes of its modules stay as they are.
    """
    with evaluating(model):
        if not _keeps_apart(model, pad_id, flat):
            raise _refused(model)


def _keeps_apart(model: nn.Module, pad_id: int, flat: bool) -> bool:
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    known = [i for i in range(min(embedding.shape[0], 1000)) if i != pad_id]
    items = []
    for length in _PROBES:
        ids = [known[i] for i in torch.randint(len(known), (length,), generator=generator).tolist()]
        items.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    batch = PackingCollator(_PROBE_ROW, pad_id, flat)(items)
    batch = {
        name: value.to(embedding.device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    try:
        packed = _logits(model, batch)
    except (TypeError, ValueError) as error:  # arguments that the model does not take
        raise _refused(model) from error
    seen = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "use_cache")}
    # with a mask a row is one sequence, which has one prompt: that of its first example
    seen["labels"] = seen["labels"].masked_fill((seen["position_ids"] == 0).cumsum(1) > 1, IGNORED)
    leaking = _logits(model, seen | {"attention_mask": torch.ones_like(batch["input_ids"])})
    if packed is None or leaking is None:
        return False
    # some models give logits of more digits than they compute with
    eps = max(
        torch.finfo(tensor.dtype).eps
        for tensor in (packed, embedding)
        if tensor.is_floating_point()
    )
    differences = []
    for number, row in enumerate([range(len(items))] if flat else packed_rows(_PROBES, _PROBE_ROW)):
        start = 0
        for index in row:
            place = slice(start, start + _PROBES[index])
            start = place.stop
            alone = _logits(
                model,
                {name: batch[name][number : number + 1, place] for name in ("input_ids", "labels")},
            )
            if alone is None:
                return False
            found = (packed[number, place] - alone[0], leaking[number, place] - alone[0], alone[0])
            differences.append(torch.stack([tensor.abs().max() for tensor in found]))
    error, leak, scale = torch.stack(differences).amax(0).tolist()
    rounding = eps * scale
    return rounding < leak and error <= (rounding * leak) ** 0.5  # not so of NaN either


def _logits(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """Logits of every token ``[B, T, V]``; None from a model that gives none."""
    logits = getattr(model(**arguments, return_dict=True), "logits", None)
    shape = arguments["input_ids"].shape
    return (
        logits
        if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == shape
        else None
    )


def _refused(model: nn.Module) -> UserError:
    what = f"got a {type(bare(model)).__name__}, which does not keep packed sequences apart"
    return UserError(
        f"--packing: {what}, expected a causal language model whose attention follows position ids"
    )
