"""From one call's arguments to rows: where each example's prompt starts and ends, and which rows of this forward it selects.

Where a prompt ends, by the first of these that is there: an explicit ``prompt_lengths`` (or ``edit_positions``), what
``generate`` was called with, token labels (it ends at the first that is not -100), the attention mask (all real tokens are
prompt), the sequence itself. A prompt starts at its first real token, so either padding side is understood. Everything here is
tensor arithmetic on the tokens' device: no synchronisation but for explicit arguments, which are checked.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import positions
from reft_kernels.checks import describe, mark_rows
from reft_kernels.positions import Spec

EXPLICIT = ("prompt_lengths", "edit_positions")
"""Keyword arguments of the edited model's ``forward`` and ``generate`` that are taken out before the model sees them:

prompt_lengths   integers ``[B]``: prompt tokens of each example (of each sequence of a packed batch)
edit_positions   the columns themselves: integers ``[B, P]``, -1 pads, or a bool mask ``[B, T]``; replaces the spec
"""
_CACHES = ("past_key_values", "past_key_value", "layer_past")


class Explicit(NamedTuple):
    """What the caller said about positions, and the labels, which a backbone does not see."""

    labels: Tensor | None = None
    prompt_lengths: Any = None
    edit_positions: Tensor | None = None


class Selection(NamedTuple):
    """Rows of ``hidden.view(-1, d)`` (None: all), and the weight set of each row where prefix and suffix are untied."""

    rows: Tensor | None
    set_ids: Tensor | None


class Generation:
    """What a running ``generate`` was called with: the whole prompt, of which a forward may see a part."""

    def __init__(self, mask: Tensor | None, width: int | None, explicit: Explicit) -> None:
        self.mask = mask
        self.width = width
        self.explicit = explicit
        self.seen = 0  # columns that went through the cache so far, where the cache itself would have to be asked on its device


@dataclasses.dataclass
class Window:
    """The part of a batch that one forward of a backbone sees: columns ``offset`` to ``offset + width``.

    ``starts`` and ``lengths`` ``[B]`` are the prompts, in columns of the whole; None while decoding. ``tokens`` is the mask
    ``[B, width]`` of real tokens here, None where all are. ``packed`` holds the position ids of a packed batch.
    """

    batch: int
    width: int
    device: torch.device
    offset: int | Tensor = 0
    total: int | Tensor = 0  # columns of the whole, where the prompts are
    starts: Tensor | None = None
    lengths: Tensor | None = None
    tokens: Tensor | None = None
    packed: Tensor | None = None
    explicit: Explicit = Explicit()


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's positional ``forward`` parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds)


def _repeat(tensor: Tensor, batch: int, name: str) -> Tensor:
    """One entry for each example as one for each row of the batch: beams and returned sequences repeat theirs."""
    count = tensor.shape[0]
    if count == batch:
        return tensor
    if count == 0 or batch % count:
        raise ValueError(f"{name}: got {count} examples, expected {batch}")
    return tensor.repeat_interleave(batch // count, dim=0)


def _past(arguments: Mapping[str, Any], width: int, generation: Generation | None) -> int | Tensor:
    """Columns that the cache holds already."""
    cache = next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)
    if cache is None:
        return 0
    past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2]
    if not isinstance(past, Tensor) or torch.compiler.is_compiling():
        return past
    if generation is None:
        return int(past)
    # a cache that counts on its device is asked once in a generation; after that the host counts
    if generation.seen == 0:
        generation.seen = int(past)
    past = generation.seen
    generation.seen = past + width
    return past


def _two_dimensional(mask: Any, batch: int) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch else None


def _explicit_lengths(value: Any, batch: int, limits: Tensor | int, device: torch.device) -> Tensor:
    lengths = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"prompt_lengths: got {describe(lengths)}, expected one integer for each example, [B]")
    lengths = _repeat(lengths.to(device=device, dtype=torch.int64), batch, "prompt_lengths")
    if not torch.compiler.is_compiling():
        wrong = (lengths < 0) | (lengths > limits)
        if bool(wrong.any()):
            example = int(wrong.to(torch.int8).argmax())
            limit = limits if isinstance(limits, int) else int(limits[example])
            raise ValueError(
                f"prompt_lengths: got {int(lengths[example])} for example {example}, expected 0 to {limit}, the tokens it has"
            )
    return lengths


def look(
    arguments: Mapping[str, Any],
    explicit: Explicit,
    generation: Generation | None,
    *,
    token_labels: bool,
    decoder: bool,
) -> Window | None:
    """The window of one backbone call; None where the arguments do not tell how many tokens there are (images, say).

    Args:
        arguments: the call's arguments by name.
        token_labels: labels ``[B, T]`` mark what follows the prompt (a generating model, not a token classifier).
        decoder: the backbone is the decoder of an encoder-decoder model, whose inputs are its labels shifted by one.
    """
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    batch, width, device = tokens.shape[0], tokens.shape[1], tokens.device
    if generation is not None and generation.width is None:
        generation.width = width
    past = _past(arguments, width, generation)
    window = Window(batch, width, device, past, explicit=explicit)
    mask = _two_dimensional(arguments.get("attention_mask"), batch)
    if mask is not None:
        window.tokens = mask[:, mask.shape[1] - width :] != 0
    at_start = isinstance(past, int) and past == 0
    if generation is not None:
        if isinstance(past, int) and past >= generation.width:
            return window
        whole, total = _generated_prompt(generation, mask, past, batch, device)
    elif at_start or isinstance(past, Tensor) or not (explicit.prompt_lengths is None and explicit.edit_positions is None):
        whole = None if mask is None else mask != 0
        total = width if at_start else past + width
    else:
        return window  # a cache and no word about the prompt: decoding
    window.total = total
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    window.starts = zeros if whole is None else positions.first_tokens(whole)
    if whole is not None and generation is not None:
        # a chunk that is all padding so far: the prompt starts after it
        window.starts = torch.where(whole.any(dim=1), window.starts, whole.shape[1])
    _find_lengths(window, arguments, whole, total, generation, token_labels, decoder)
    return window


def _generated_prompt(
    generation: Generation, mask: Tensor | None, past: int | Tensor, batch: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """The mask of the whole prompt of a generation (or of what is known of it), and its width."""
    if generation.mask is not None:
        return _repeat(generation.mask.to(device) != 0, batch, "attention_mask"), generation.width
    if mask is None:
        return None, generation.width
    whole = mask[:, : generation.width] != 0
    missing = generation.width - whole.shape[1]
    if missing > 0:  # later chunks: padded left, what is still to come is real
        whole = torch.cat([whole, whole.new_ones(batch, missing)], dim=1)
    return whole, generation.width


def _find_lengths(window, arguments, whole, total, generation, token_labels, decoder) -> None:
    batch, device, explicit = window.batch, window.device, window.explicit
    labels = explicit.labels
    position_ids = arguments.get("position_ids")
    is_packed = (
        token_labels and whole is None and generation is None and not decoder
        and isinstance(position_ids, Tensor) and position_ids.shape == (batch, window.width)
    )  # fmt: skip
    if is_packed and isinstance(window.offset, int) and window.offset == 0:
        window.packed = position_ids
    elif explicit.prompt_lengths is not None:
        limits = total if whole is None else whole.sum(dim=1)
        window.lengths = _explicit_lengths(explicit.prompt_lengths, batch, limits, device)
    elif token_labels and isinstance(labels, Tensor) and labels.shape == (batch, window.width):
        labels = labels.to(device)
        if decoder:
            supervised = (labels != positions.IGNORED_LABEL).to(torch.int8)
            window.lengths = ((supervised.cumsum(dim=1) == 0).sum(dim=1) + 1).clamp(max=window.width)
        else:
            window.lengths = positions.prompt_lengths_from_labels(labels, whole)
    elif whole is not None:
        window.lengths = whole.sum(dim=1)
    else:
        window.lengths = torch.zeros(batch, dtype=torch.int64, device=device) + total


# ---- selection


def select(window: Window, spec: Spec, untied: bool) -> Selection | None:
    """The rows that ``spec`` selects in a window; None when there are none, as in every decoding step of a prompt's edit.

    Raises:
        ValueError: explicit arguments that do not fit the batch.
    """
    if window.explicit.edit_positions is not None:
        return _from_positions(window, untied)
    if spec.kind == "all" and not untied:
        return Selection(_real_rows(window), None)
    if window.packed is not None:
        return _from_packed(window, spec, untied)
    if window.lengths is None:
        return None
    rows = positions.prompt_rows(
        spec, window.starts, window.lengths, window.width, token_mask=window.tokens, offset=window.offset
    )
    return Selection(rows, positions.set_ids(spec, window.batch, device=window.device) if untied else None)


def select_from_shape(
    shape: torch.Size, device: torch.device, spec: Spec, untied: bool, explicit: Explicit
) -> Selection | None:
    """Rows where the call tells nothing of tokens: by the hidden state's shape ``[B, T, d]``, all of it prompt unless said."""
    batch, width = (1, shape[0]) if len(shape) == 2 else shape[:2]
    window = Window(batch, width, device, total=width, explicit=explicit)
    window.starts = torch.zeros(batch, dtype=torch.int64, device=device)
    if explicit.prompt_lengths is None:
        if spec.kind == "prompt" and explicit.edit_positions is None:
            return Selection(None, None)
        window.lengths = window.starts + width
    else:
        window.lengths = _explicit_lengths(explicit.prompt_lengths, batch, width, device)
    return select(window, spec, untied)


def _real_rows(window: Window) -> Tensor | None:
    """Rows of real tokens, None for all; where asking costs a synchronisation a mask is taken to hide something."""
    tokens = window.tokens
    if tokens is None or window.lengths is None:
        return None
    if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool(tokens.all()):
        return None
    return positions.from_mask(tokens)


def _from_positions(window: Window, untied: bool) -> Selection | None:
    chosen = window.explicit.edit_positions
    if not isinstance(chosen, Tensor):
        chosen = torch.as_tensor(chosen)
    if window.lengths is None and window.packed is None:
        return None
    chosen = _repeat(chosen.to(window.device), window.batch, "edit_positions")
    compiling, offset = torch.compiler.is_compiling(), window.offset
    if chosen.dtype == torch.bool and not untied:
        if chosen.dim() != 2 or chosen.shape[1] > window.total:
            raise ValueError(f"edit_positions: got {describe(chosen)}, expected a mask ({window.batch}, {window.total})")
        here = chosen[:, offset : offset + window.width]
        return Selection(positions.from_mask(torch.nn.functional.pad(here, (0, window.width - here.shape[1]))), None)
    if chosen.dim() != 2 or chosen.dtype not in (torch.int32, torch.int64):
        expected = "integer columns [B, P]" + ("" if untied else " or a bool mask [B, T]")
        raise ValueError(f"edit_positions: got {describe(chosen)}, expected {expected}")
    if not compiling:
        positions.from_indices(chosen, int(window.total))  # columns out of range or repeated are refused here
    columns = chosen - offset
    base = torch.arange(window.batch, device=window.device).unsqueeze(1) * window.width
    skipped = (chosen < 0) | (columns < 0) | (columns >= window.width)
    rows = torch.where(skipped, -1, columns + base).to(torch.int32).flatten()
    rows = mark_rows(rows, window.batch * window.width)
    if not untied:
        return Selection(rows, None)
    count = columns.shape[1]
    if count % 2:
        raise ValueError(f"edit_positions: got {count} columns, expected an even number: share_weights=False halves them")
    ids = (torch.arange(count, device=window.device) >= count // 2).to(torch.int32).repeat(window.batch)
    return Selection(rows, mark_rows(ids, 2))


def _from_packed(window: Window, spec: Spec, untied: bool) -> Selection:
    """Rows of a packed batch, whose position ids start again at 0 with each sequence: one entry a token."""
    position = window.packed.reshape(-1)
    count, device = position.shape[0], position.device
    index = torch.arange(count, device=device)
    sequence = ((position == 0).cumsum(0) - 1).clamp(min=0)
    start = (index - position).clamp(min=0)
    explicit = window.explicit
    if explicit.prompt_lengths is not None:
        given = explicit.prompt_lengths
        given = (given if isinstance(given, Tensor) else torch.as_tensor(given)).to(device=device, dtype=torch.int64)
        length = given[sequence]
        prompt = position < length
    else:
        prompt = torch.ones_like(position, dtype=torch.bool)
        if isinstance(explicit.labels, Tensor) and explicit.labels.shape == window.packed.shape:
            supervised = (explicit.labels.to(device).reshape(-1) != positions.IGNORED_LABEL).to(torch.int64)
            running = supervised.cumsum(0)
            prompt = running == (running - supervised)[start]
        length = torch.zeros(count, dtype=torch.int64, device=device).index_add_(0, sequence, prompt.to(torch.int64))[sequence]
    last = torch.zeros_like(prompt)
    if spec.kind == "ends":
        length = (length - 1).clamp(min=0) if spec.pyreft else length
        prompt = prompt & (position < length)
        available = length // 2 if spec.halves else length
        last = prompt & (position >= length - available.clamp(max=spec.last))
        prompt = (prompt & (position < available.clamp(max=spec.first))) | last
    rows = torch.where(prompt, index, -1).to(torch.int32)
    ids = last.to(torch.int32) if untied else None
    if device.type == "cpu" and not torch.compiler.is_compiling():
        rows, ids = rows[prompt], None if ids is None else ids[prompt]
    return Selection(mark_rows(rows, count), None if ids is None else mark_rows(ids, 2))


def take_explicit(kwargs: dict[str, Any]) -> Explicit:
    """Take the explicit arguments out of a call's keyword arguments, and note the labels."""
    taken = {name: kwargs.pop(name) for name in EXPLICIT if name in kwargs}
    return Explicit(labels=kwargs.get("labels"), **taken)
