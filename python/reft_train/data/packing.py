"""Packing of several examples into one row without padding between them.

Position ids restart at 0 with each example and no attention mask is passed, so transformers' models
keep tokens of different examples apart, and the engine finds each example's prompt.
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
FILLING = 0.05  # fraction of filler tokens accepted in short rows
_EXAMPLES_A_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# token counts of the test sequences: two rows with two each, one row with filler
_PROBES, _PROBE_ROW = ((9, 5, 7, 12), 17)


@dataclass(frozen=True)
class PackingCollator:
    """Collate causal items into ``input_ids``, ``labels`` and ``position_ids`` ``[n, T]``.

    The end of a row is filled with a separate sequence whose labels are all -100. The first label
    of each example is -100 too, since the token before it belongs to another example. ``use_cache``
    is False because with a cache the model would not build the mask from the position ids.

    Args:
        row_length: target tokens of a row. Rows are shorter if shorter rows can be filled
            (:func:`packed_rows`), and longer if examples do not divide evenly.
        pad_id: filler token.
        flat: return one row ``[1, M]`` without filler, and the boundaries for flash attention.
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
            # the filler counts as a prompt: its edits affect no other token and no loss
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
    """Assign examples to rows, using the shortest row length with at most ``FILLING`` filler.

    Attention costs as much for a packed row as for one long example, so short examples go into
    short rows. If no length reaches that, rows have ``row_length`` tokens.
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

    Random sequences must give the same logits alone and packed. With eps of the model's dtype,
    ``rounding`` = eps * max|logits|, and ``leak`` the change of the logits when a mask exposes the
    preceding examples, the largest difference allowed is sqrt(rounding * leak), the geometric mean
    of the two error levels.

    Args:
        model: on its device, in its training dtype. The modes of its modules are not changed.
    """
    with evaluating(model):
        if not _keeps_apart(model, pad_id, flat):
            raise _not_packable(model)


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
    except (TypeError, ValueError) as error:  # the model does not accept the arguments
        raise _not_packable(model) from error
    seen = {name: batch[name] for name in ("input_ids", "labels", "position_ids", "use_cache")}
    # with a mask a row is one sequence with one prompt, that of its first example
    seen["labels"] = seen["labels"].masked_fill((seen["position_ids"] == 0).cumsum(1) > 1, IGNORED)
    leaking = _logits(model, seen | {"attention_mask": torch.ones_like(batch["input_ids"])})
    if packed is None or leaking is None:
        return False
    # some models return logits in a wider dtype than they compute in
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
            tensors = (
                packed[number, place] - alone[0],
                leaking[number, place] - alone[0],
                alone[0],
            )
            differences.append(torch.stack([tensor.abs().max() for tensor in tensors]))
    error, leak, scale = torch.stack(differences).amax(0).tolist()
    rounding = eps * scale
    return rounding < leak and error <= (rounding * leak) ** 0.5  # also False for NaN


def _logits(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the logits of every token ``[B, T, V]``, or None if the model returns none."""
    logits = getattr(model(**arguments, return_dict=True), "logits", None)
    shape = arguments["input_ids"].shape
    return (
        logits
        if isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == shape
        else None
    )


def _not_packable(model: nn.Module) -> UserError:
    what = f"got a {type(bare(model)).__name__}, which does not keep packed sequences apart"
    return UserError(
        f"--packing: {what}, expected a causal language model whose attention follows position ids"
    )
