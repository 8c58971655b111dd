"""Computes the window of a forward: the start and end of each prompt, and the visible part.

The end of a prompt is determined by the first of these that applies:

    edit_positions, prompt_lengths     arguments of the model or of ``generate``
    the adapter's response template    the end of its last occurrence in the text
    generate                           the end of its input
    labels                             the first label that is not -100, if labels ``[B, T]``
                                       continue a prompt
    the attention mask                 the last real token

A prompt starts at its first real token, so both padding sides work. All operations run on the
tokens' device and do not synchronize, except for checks of explicit arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reft_kernels import positions
from reft_kernels.model.caches import cache_of, cached_columns
from reft_kernels.model.explicit_arguments import explicit_lengths, repeat_examples
from reft_kernels.model.generation import Generation
from reft_kernels.model.model_call import ModelCall
from reft_kernels.model.response_rule import supervised
from reft_kernels.model.window import Packed, Window


def _usable_mask(mask: Any, batch: int, width: int) -> Tensor | None:
    fits = (
        isinstance(mask, Tensor)
        and mask.dim() == 2
        and mask.shape[0] == batch
        and mask.shape[1] >= width
    )
    return mask if fits else None


def _text_of(
    arguments: Mapping[str, Any], call: ModelCall, batch: int, width: int
) -> Tensor | None:
    """Token ids ``[B, width]`` from the arguments of the backbone or the model, or None."""
    for ids in (arguments.get("input_ids"), call.input_ids):
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == (batch, width):
            return ids
    return None


def _offset(
    arguments: Mapping[str, Any], cache: Any, width: int, generation: Generation | None
) -> int | Tensor | None:
    """First column of a forward; None if a cache has an unknown number of columns."""
    if generation is not None and not torch.compiler.is_compiling():
        offset = generation.offset(width)
        if offset is not None:
            return offset
    return 0 if cache is None else cached_columns(cache, arguments)


def compute_prompt_window(
    arguments: Mapping[str, Any],
    call: ModelCall,
    generation: Generation | None,
    *,
    token_labels: bool,
    decoder: bool,
) -> Window | None:
    """The window of one call of a backbone.

    Args:
        arguments: arguments of the backbone's call, by name.
        call: arguments that the user passed to the model.
        generation: the running ``generate``, if any.
        token_labels: whether labels ``[B, T]`` mark the tokens after the prompt, as for a
            generating model and unlike a token classifier.
        decoder: whether the backbone is the decoder of an encoder-decoder model, whose inputs are
            its labels shifted by one.

    Returns:
        None if the call has no tokens (images, for example).

    Raises:
        ValueError: explicit arguments do not fit the batch.
    """
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    batch, width, device = tokens.shape[0], tokens.shape[1], tokens.device
    if generation is not None and generation.width is None:
        generation.width = width
    cache = cache_of(arguments)
    past = _offset(arguments, cache, width, generation)
    window = Window(
        batch, width, device, 0 if past is None else past, call=call, generation=generation
    )
    mask = _usable_mask(arguments.get("attention_mask"), batch, width)
    if mask is None:  # the model may pass the backbone a mask in another form
        mask = _usable_mask(
            call.decoder_attention_mask if decoder else call.attention_mask, batch, width
        )
    if mask is not None:
        window.tokens = mask[:, mask.shape[1] - width :] != 0
    window.ids = _text_of(arguments, call, batch, width)
    if past is None:
        return window  # recurrent states of unknown length: decoding
    at_start = isinstance(past, int) and past == 0
    total: int | Tensor
    if generation is not None:
        total = width if generation.width is None else generation.width
        if isinstance(past, int) and past >= total:
            return window
        whole = _generated_prompt(generation, total, mask, batch, device)
    elif at_start or isinstance(past, Tensor) or call.is_explicit:
        whole = None if mask is None else mask != 0
        total = width if at_start else past + width
        window.continues = not at_start or (cache is not None and not torch.is_grad_enabled())
        if not at_start and whole is not None and isinstance(past, int) and whole.shape[1] != total:
            whole = None  # the mask lacks the cached columns
        if at_start:
            window.text = window.ids
    else:
        return window  # a filled cache and no explicit arguments: decoding
    window.total, window.whole = total, whole
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    window.starts = zeros if whole is None else positions.first_tokens(whole)
    if whole is not None and (generation is not None or window.continues):
        # a row that is all padding so far: its prompt starts in a later chunk
        window.starts = torch.where(whole.any(dim=1), window.starts, whole.shape[1])
    _find_lengths(window, token_labels, decoder)
    return window


def _generated_prompt(
    generation: Generation, width: int, mask: Tensor | None, batch: int, device: torch.device
) -> Tensor | None:
    """Mask ``[B, width]`` of the whole prompt of a generation, as far as it is known, or None."""
    if generation.mask is not None:
        return repeat_examples(generation.mask.to(device) != 0, batch, "attention_mask")
    if mask is None:
        return None
    whole = mask[:, :width] != 0
    missing = width - whole.shape[1]
    if missing > 0:  # generate pads on the left, so the tokens of later chunks are real
        whole = torch.cat([whole, whole.new_ones(batch, missing)], dim=1)
    return whole


def _packing_ids(position_ids: Any, batch: int, width: int) -> Tensor | None:
    """Position ids of the user that tell packed sequences apart, or None.

    Returns:
        Integers ``[B, T]``; or ``[3, B, T]``, the temporal, vertical and horizontal position of
        each token, as vision-language models count. Of four rows the first is the plain position.
    """
    if not isinstance(position_ids, Tensor):
        return None
    if position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    shape = tuple(position_ids.shape)
    return position_ids if shape in ((batch, width), (3, batch, width)) else None


def _pack(position_ids: Tensor) -> Packed:
    """The sequences of a packed batch.

    A sequence starts in the first column of each row, and where position ids do not increase by
    one. Of three rows, it starts where the triple (temporal, vertical, horizontal) does not
    increase in lexicographic order: an image holds the first and scans the others row by row.

    Args:
        position_ids: integers ``[B, T]`` or ``[3, B, T]``.
    """
    batch, width = position_ids.shape[-2:]
    before, after = position_ids[..., :-1], position_ids[..., 1:]
    if position_ids.dim() == 3:
        later = after[2] > before[2]
        for axis in (1, 0):
            later = (after[axis] > before[axis]) | ((after[axis] == before[axis]) & later)
        steps = ~later
    else:
        steps = after != before + 1
    begins = torch.nn.functional.pad(steps, (1, 0), value=True).reshape(-1)
    index = torch.arange(batch * width, device=position_ids.device)
    first = torch.where(begins, index, 0).cummax(0).values if batch * width else index
    return Packed((begins.cumsum(0) - 1).clamp(min=0), index - first, begins)


def _find_lengths(window: Window, token_labels: bool, decoder: bool) -> None:
    """Set ``packed``, or ``lengths`` and ``source``, of a window."""
    batch, device, call = window.batch, window.device, window.call
    labels, shape = call.labels, (batch, window.width)
    ids = _packing_ids(call.position_ids, *shape)
    if token_labels and isinstance(labels, Tensor) and labels.shape == shape:
        window.labels = labels.to(device)
    # only position ids from the user mark packing; models compute their own, in several forms
    may_be_packed = (
        token_labels and window.whole is None and window.generation is None and not decoder
    )
    if may_be_packed and ids is not None and isinstance(window.offset, int) and window.offset == 0:
        window.packed = _pack(ids.to(device))
    elif call.prompt_lengths is not None:
        limits: Tensor | int | None = None
        if not window.continues:
            limits = window.total if window.whole is None else window.whole.sum(dim=1)
        window.lengths = explicit_lengths(call.prompt_lengths, batch, limits, device)
        window.source = "prompt_lengths"
    elif window.labels is not None and window.generation is None:
        window.source = "labels"
        if decoder:
            before = supervised(window.labels).to(torch.int8).cumsum(dim=1) == 0
            window.lengths = (before.sum(dim=1) + 1).clamp(max=window.width)
        else:
            window.lengths = positions.prompt_lengths_from_labels(window.labels, window.whole)
    else:
        window.source = "sequence" if window.generation is None else "generate"
        if window.whole is not None:
            window.lengths = window.whole.sum(dim=1)
        else:
            window.lengths = torch.zeros(batch, dtype=torch.int64, device=device) + window.total


def window_of_shape(
    shape: torch.Size, device: torch.device, call: ModelCall, frame_mask: Any = None
) -> Window:
    """The window of a hidden state whose rows are not the tokens of the call.

    All rows are prompt, unless the call has explicit arguments and no tokens.

    Args:
        shape: shape of the hidden state, ``[B, T, d]`` or ``[T, d]``.
        device: device of the hidden state.
        call: arguments of the model's call.
        frame_mask: the model's map from samples to frames, (frames, audio mask ``[B, S]``) ->
            bool ``[B, frames]``; None if it has none.

    Raises:
        ValueError: an audio mask has padding, and the model has no ``frame_mask``.
    """
    batch, width = (1, shape[0]) if len(shape) == 2 else shape[:2]
    positioned = (
        call if not call.has_tokens else call._replace(prompt_lengths=None, edit_positions=None)
    )
    window = Window(batch, width, device, total=width, call=positioned)
    window.starts = torch.zeros(batch, dtype=torch.int64, device=device)
    window.tokens = _frames(call.audio_mask, batch, width, device, frame_mask)
    if window.tokens is not None:
        window.whole = window.tokens
        window.starts = positions.first_tokens(window.tokens)
    limits = width if window.whole is None else window.whole.sum(dim=1)
    if positioned.prompt_lengths is not None:
        window.lengths = explicit_lengths(positioned.prompt_lengths, batch, limits, device)
        window.source = "prompt_lengths"
    else:
        window.lengths = torch.zeros_like(window.starts) + limits
    return window


def _frames(
    mask: Tensor | None, batch: int, width: int, device: torch.device, frame_mask: Any
) -> Tensor | None:
    """Mask of the real frames of an audio input, bool ``[B, width]``; None: all."""
    if mask is None or mask.dim() != 2 or mask.shape[0] != batch:
        return None
    if frame_mask is not None:
        return frame_mask(width, mask).to(device) != 0
    if mask.shape[1] == width:
        return mask.to(device) != 0
    if mask.device.type == "cpu" and bool(mask.all()):
        return None
    raise ValueError(
        f"attention_mask: got {tuple(mask.shape)} for hidden states of {width} frames, and the "
        "model does not map the mask to frames; pass edit_positions=, or a batch without padding"
    )
