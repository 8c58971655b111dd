"""From one call's arguments to a window: where each example's prompt starts and ends, and the part
that a forward sees.

Where a prompt ends, by the first of these that says so:

    edit_positions, prompt_lengths     given to the model or to ``generate``
    the adapter's response template    after its last occurrence in the text, the same in every path
    generate                           its whole input
    labels                             before the first that is not -100, where labels ``[B, T]``
                                       continue a prompt
    the attention mask, the sequence   every real token

A prompt starts at its first real token, so either padding side is understood. Everything here is
tensor arithmetic on the tokens' device: no synchronisation but for explicit arguments, which are
checked.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels import positions
from reft_kernels.model.caches import cache_of, cached_columns
from reft_kernels.model.call_state import ModelCall
from reft_kernels.model.generation import Generation
from reft_kernels.model.response_rule import Occurrences, Template, find_template, supervised
from reft_kernels.model.selection import explicit_lengths, repeat_examples


class Packed(NamedTuple):
    """A packed batch, flattened to ``[B * T]``: each token's sequence, its place there, whether
    it starts one.
    """

    sequence: Tensor
    place: Tensor
    begins: Tensor


@dataclasses.dataclass
class Window:
    """The part of a batch that one forward of a backbone sees: columns ``offset`` to ``offset +
    width``.

    ``starts`` and ``lengths`` int64 ``[B]`` are the prompts, in columns of the whole; None while
    decoding. ``source`` says what
    ended them: "prompt_lengths", "generate", "labels" or "sequence". ``tokens`` is the mask ``[B,
    width]`` of real tokens here, None where all are; ``text`` the token ids ``[B, total]`` of the
    whole, where they are known.
    """

    batch: int
    width: int
    device: torch.device
    offset: int | Tensor = 0
    total: int | Tensor = 0  # columns of the whole, where the prompts are
    continues: bool = False  # a cache is filled: more of the prompt may be to come
    starts: Tensor | None = None
    lengths: Tensor | None = None
    source: str = "sequence"
    tokens: Tensor | None = None
    whole: Tensor | None = None
    text: Tensor | None = None
    packed: Packed | None = None
    labels: Tensor | None = None
    call: ModelCall = ModelCall()
    generation: Generation | None = None
    found: dict[Template, Occurrences] = dataclasses.field(default_factory=dict)

    def occurrences(self, template: Template) -> Occurrences | None:
        """Where ``template`` ends in the whole text; None where the text is not known."""
        if self.generation is not None and self.text is None:
            return self.generation.occurrences(template, self.batch, self.device)
        if self.text is None:
            return None
        if template not in self.found:
            text = self.text if self.whole is None else torch.where(self.whole, self.text, -1)
            segments = (
                None if self.packed is None else self.packed.sequence.view(self.batch, self.width)
            )
            self.found[template] = find_template(text, template, segments)
        return self.found[template]

    def prompt_lengths(self, template: Template | None) -> Tensor | None:
        """Prompt lengths int64 ``[B]`` under an adapter's rule; None while decoding."""
        if template is None or self.lengths is None or self.source == "prompt_lengths":
            return self.lengths
        found = self.occurrences(template)
        if found is None:
            return self.lengths
        return torch.where(found.last > 0, (found.last - self.starts).clamp(min=0), self.lengths)

    def packed_prompt(self, template: Template | None) -> Tensor:
        """Bool ``[B * T]``: the prompts' tokens of a packed batch under an adapter's rule."""
        sequence, place, _ = self.packed
        if self.call.prompt_lengths is not None:
            return place < self._packed_lengths()[sequence]
        prompt = torch.ones_like(place, dtype=torch.bool)
        if self.labels is not None:
            chosen = supervised(self.labels).reshape(-1).to(torch.int64)
            running = chosen.cumsum(0)
            first = torch.arange(place.shape[0], device=self.device) - place
            prompt = running == (running - chosen)[first]
        if template is None:
            return prompt
        length = self.packed_ends(template)[sequence]
        return torch.where(length > 0, place < length, prompt)

    def packed_ends(self, template: Template) -> Tensor:
        """Int64 ``[B * T]``: for each sequence of a packed batch the tokens up to its last
        template's end, 0 without one.
        """
        found, (sequence, place, _) = self.occurrences(template), self.packed
        ends = torch.where(found.after[:, 1:].reshape(-1), place + 1, 0)
        return torch.zeros_like(place).scatter_reduce(0, sequence, ends, "amax")

    def _packed_lengths(self) -> Tensor:
        given = self.call.prompt_lengths
        given = (given if isinstance(given, Tensor) else torch.as_tensor(given)).to(
            device=self.device
        )
        if (
            given.dim() != 1
            or given.is_floating_point()
            or given.dtype == torch.bool
            or not given.numel()
        ):
            raise ValueError(
                f"prompt_lengths: got {given.dtype} {tuple(given.shape)}, expected one integer "
                "for each sequence"
            )
        sequence, place, _ = self.packed
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            count = int(sequence[-1]) + 1 if sequence.numel() else 0
            sizes = torch.zeros(count, dtype=torch.int64).scatter_reduce(
                0, sequence, place + 1, "amax"
            )
            if given.shape[0] != count:
                raise ValueError(
                    f"prompt_lengths: got {given.shape[0]} for a packed batch, expected {count}, "
                    "its sequences"
                )
            explicit_lengths(given, count, sizes, self.device)
        return given.to(torch.int64)[: place.shape[0]]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's positional ``forward`` parameters."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds
    )


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
    for ids in (arguments.get("input_ids"), call.input_ids):
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == (batch, width):
            return ids
    return None


def _offset(
    arguments: Mapping[str, Any], cache: Any, width: int, generation: Generation | None
) -> int | Tensor | None:
    """Column of the whole at which a forward starts; None where a cache holds some columns and
    cannot say how many.
    """
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
    """The window of one backbone call; None where the arguments do not tell how many tokens there
    are (images, say).

    Args:
        arguments: the backbone call's arguments by name. call: what the user passed to the model.
        token_labels: labels ``[B, T]`` mark what follows the prompt (a generating model, not a
        token classifier).
        decoder: the backbone is the decoder of an encoder-decoder model, whose inputs are its
            labels shifted by one.

    Raises:
        ValueError: explicit arguments that do not fit the batch, or a mask that hides tokens and
            fits no tokens.
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
    if mask is None:  # a wrapper hands on another form of it
        mask = _usable_mask(
            call.decoder_attention_mask if decoder else call.attention_mask, batch, width
        )
    if mask is not None:
        window.tokens = mask[:, mask.shape[1] - width :] != 0
    if past is None:
        return window  # a recurrent state and no word about the prompt: decoding
    at_start = isinstance(past, int) and past == 0
    if generation is not None:
        if isinstance(past, int) and past >= generation.width:
            return window
        whole, total = _generated_prompt(generation, mask, batch, device)
    elif at_start or isinstance(past, Tensor) or call.is_explicit:
        whole = None if mask is None else mask != 0
        total = width if at_start else past + width
        window.continues = not at_start or (cache is not None and not torch.is_grad_enabled())
        if not at_start and whole is not None and isinstance(past, int) and whole.shape[1] != total:
            whole = None  # a mask of these tokens alone does not tell where the whole starts
        if at_start:
            window.text = _text_of(arguments, call, batch, width)
    else:
        return window  # a cache and no word about the prompt: decoding
    window.total, window.whole = total, whole
    zeros = torch.zeros(batch, dtype=torch.int64, device=device)
    window.starts = zeros if whole is None else positions.first_tokens(whole)
    if whole is not None and (generation is not None or window.continues):
        # a chunk that is all padding so far: the prompt starts after it
        window.starts = torch.where(whole.any(dim=1), window.starts, whole.shape[1])
    _find_lengths(window, token_labels, decoder)
    return window


def _generated_prompt(
    generation: Generation, mask: Tensor | None, batch: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """The mask of the whole prompt of a generation (or of what is known of it), and its width."""
    if generation.mask is not None:
        return repeat_examples(
            generation.mask.to(device) != 0, batch, "attention_mask"
        ), generation.width
    if mask is None:
        return None, generation.width
    whole = mask[:, : generation.width] != 0
    missing = generation.width - whole.shape[1]
    if missing > 0:  # later chunks: padded left, what is still to come is real
        whole = torch.cat([whole, whole.new_ones(batch, missing)], dim=1)
    return whole, generation.width


def _pack(position_ids: Tensor) -> Packed:
    """Sequences of a packed batch: a new one starts in each row's first column and where
    positions do not go up by one.
    """
    batch, width = position_ids.shape
    steps = position_ids[:, 1:] != position_ids[:, :-1] + 1
    begins = torch.nn.functional.pad(steps, (1, 0), value=True).reshape(-1)
    index = torch.arange(batch * width, device=position_ids.device)
    first = torch.where(begins, index, 0).cummax(0).values if batch * width else index
    return Packed((begins.cumsum(0) - 1).clamp(min=0), index - first, begins)


def _find_lengths(window: Window, token_labels: bool, decoder: bool) -> None:
    batch, device, call = window.batch, window.device, window.call
    labels, ids = call.labels, call.position_ids
    shape = (batch, window.width)
    if token_labels and isinstance(labels, Tensor) and labels.shape == shape:
        window.labels = labels.to(device)
    # only what the user passed says packed: models make position ids of their own, in many forms
    packs = token_labels and window.whole is None and window.generation is None and not decoder
    if (
        packs
        and isinstance(ids, Tensor)
        and ids.shape == shape
        and isinstance(window.offset, int)
        and window.offset == 0
    ):
        window.packed = _pack(ids.to(device))
    elif call.prompt_lengths is not None:
        limits = (
            None
            if window.continues
            else window.total
            if window.whole is None
            else window.whole.sum(dim=1)
        )
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
    """The window of a hidden state ``[B, T, d]`` or ``[T, d]`` whose rows are no tokens: all of it
    is prompt unless said.

    Args:
        frame_mask: (frames, audio mask ``[B, S]``) -> bool ``[B, frames]``, a model's own map from
            samples to frames.

    Raises:
        ValueError: an audio mask that hides samples, of a model that does not tell which frames
            they are.
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
    """Real frames ``[B, width]`` by the mask of an audio input; None where all are."""
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
        "model does not tell which of "
        "them are padding; pass edit_positions=, or a batch without padding"
    )
