"""Tracks prompt boundaries during ``generate``, across prefill chunks, beams and decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reft_kernels.model.model_call import ModelCall, take_explicit
from reft_kernels.model.response_rule import Occurrences, Template, find_template

_INPUTS = ("input_ids", "inputs", "inputs_embeds")


class Generation:
    """The prompt of a running ``generate``. A forward may process only a part of it.

    Args:
        mask: attention mask ``[B, width]`` of the whole prompt; None if there is no padding or if
            only the model's calls have the mask.
        width: number of columns of the whole prompt; None for an encoder-decoder model until the
            first call of the decoder.
        call: the explicit arguments of ``generate``.
        text: integer token ids ``[B, n]`` passed to ``generate``, the last n of ``width`` columns;
            None if only embeddings were passed.
        cache: the cache passed to ``generate``.
    """

    def __init__(
        self,
        mask: Tensor | None,
        width: int | None,
        call: ModelCall,
        *,
        text: Tensor | None = None,
        cache: Any = None,
    ) -> None:
        self.mask = mask
        self.width = width
        self.call = call
        self.text = text
        self.cache = cache
        self.total: int | None = None  # number of columns at the end of the next call
        self.announced = False  # prepare() ran, so the next call of the model is generate's own
        self.is_first = True  # the backbone was not called yet
        self._occurrences: dict[Template, Occurrences] = {}

    def offset(self, width: int) -> int | None:
        """First column of a forward of ``width`` tokens, or None if :meth:`prepare` did not run."""
        if self.total is None or width > self.total:
            return None
        return self.total - width

    def prepare(self, input_ids: Any, kwargs: dict[str, Any], encoder_decoder: bool) -> None:
        """Record the number of columns at the end of the next call of the model.

        Args:
            input_ids: token ids so far, ``[B, n]``.
            kwargs: keyword arguments of ``prepare_inputs_for_generation``.
            encoder_decoder: whether the mask belongs to the encoder.
        """
        self.announced = True
        mask = kwargs.get("attention_mask")
        if not encoder_decoder and isinstance(mask, Tensor) and mask.dim() == 2:
            self.total = mask.shape[1]  # the mask spans all columns, cached ones too
        elif isinstance(input_ids, Tensor) and input_ids.dim() >= 2:
            unseen = (
                0 if self.width is None or self.text is None else self.width - self.text.shape[1]
            )
            self.total = input_ids.shape[1] + unseen
            cache: Any = kwargs.get("past_key_values")
            chunk = self.text is not None and input_ids.shape[1] < self.text.shape[1]
            if chunk and not encoder_decoder and hasattr(cache, "get_seq_length"):
                # chunked prefill: transformers drops a mask of ones, and passes the chunk alone
                self.total = int(cache.get_seq_length()) + input_ids.shape[1]
            embeds = kwargs.get("inputs_embeds")
            if not encoder_decoder and isinstance(embeds, Tensor):
                self.total = embeds.shape[1] + input_ids.shape[1]

    def is_past_prompt(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the next call of the model sees no column of the prompt.

        Args:
            inputs: what ``prepare_inputs_for_generation`` returned.
        """
        names = ("decoder_input_ids", "input_ids", "inputs_embeds")
        tokens = next((t for t in map(inputs.get, names) if isinstance(t, Tensor)), None)
        if tokens is None or tokens.dim() < 2 or self.width is None:
            return False
        offset = self.offset(tokens.shape[1])
        return offset is not None and offset >= self.width

    def occurrences(
        self, template: Template, batch: int, device: torch.device
    ) -> Occurrences | None:
        """Occurrences of ``template`` in the prompt, repeated for beams.

        Args:
            template: the response template.
            batch: batch size of the forward, beams included.
            device: device of the result.

        Returns:
            None if the token ids of the whole prompt are not known.
        """
        if self.text is None or self.text.shape[1] != self.width:
            return None
        if template not in self._occurrences:
            text = self.text
            if self.mask is not None:
                text = torch.where(self.mask.to(text.device) != 0, text, -1)
            self._occurrences[template] = find_template(text, template)
        occurrences = self._occurrences[template]
        repeats = max(1, batch // occurrences.last.shape[0])
        return Occurrences(*(t.repeat_interleave(repeats, dim=0).to(device) for t in occurrences))


def _mask_from_padding(model: nn.Module, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The attention mask that ``generate`` of transformers infers if none is passed.

    Padding tokens are masked, unless the padding token is also an end-of-sequence token.

    Returns:
        int64 ``[B, T]``, or None if no token is masked.
    """
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    if pad is None or tokens.is_floating_point() or tokens.dim() != 2:
        return None
    ends = end.tolist() if isinstance(end, Tensor) else end
    ends = ends if isinstance(ends, list | tuple) else [ends]
    mask = tokens != pad
    return None if int(pad) in ends or bool(mask.all()) else mask.to(torch.int64)


def describe_generation(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], around: Generation | None = None
) -> Generation:
    """The :class:`Generation` of a call of ``generate``.

    Args:
        model: the module whose ``generate`` is called.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call; the explicit arguments are removed.
        around: the generation of a surrounding call, whose explicit arguments apply here too.
    """
    call = explicit = ModelCall(**take_explicit(kwargs))
    if around is not None:
        scaling = around.call.scaling if call.scaling is None else call.scaling
        call = call if call.is_explicit else call.with_explicit(around.call)
        call = call._replace(scaling=scaling)
    tokens = next(
        (kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)),
        args[0] if args else None,
    )
    if explicit.scaling is not None and isinstance(tokens, Tensor):
        explicit.scaling.check_count(tokens.shape[0])
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # the encoder's call has its own mask; the decoder's first call is the decoder's prompt
        return Generation(None, None, call)
    text = (
        tokens
        if isinstance(tokens, Tensor) and tokens.dim() == 2 and not tokens.is_floating_point()
        else None
    )
    if isinstance(kwargs.get("inputs_embeds"), Tensor):
        tokens = kwargs["inputs_embeds"]
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return Generation(None, None, call)
    mask = kwargs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = _mask_from_padding(model, tokens, kwargs)
    # with a filled cache, the mask spans the cached and the new columns
    width = tokens.shape[1] if mask is None else max(mask.shape[1], tokens.shape[1])
    cache = kwargs.get("past_key_values")
    if around is not None and around.text is not None:
        if text is None and around.text.shape == tokens.shape[:2]:
            text = around.text
        elif text is not None and _continues(text, around.text):
            # self-speculative decoding: the tokens after the prompt are drafts
            return Generation(around.mask, around.width, call, text=around.text, cache=cache)
    return Generation(mask, width, call, text=text, cache=cache)


def _continues(text: Tensor, prompt: Tensor) -> bool:
    """Whether ``text`` ``[B, n]`` starts with ``prompt`` ``[B, m]`` and is longer."""
    batch, width = prompt.shape
    return (
        text.shape[0] == batch
        and text.shape[1] > width
        and bool((text[:, :width] == prompt.to(text.device)).all())
    )
