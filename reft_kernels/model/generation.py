"""``generate``: keeps what a prompt is while a model sees it chunk by chunk, beam by beam and token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft_kernels.model.prompts import Generation, take_explicit

if TYPE_CHECKING:
    from reft_kernels.model.editor import Editor

_INPUTS = ("input_ids", "inputs", "inputs_embeds")


def _mask_from_padding(model: nn.Module, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that transformers infers where none is given: padding tokens are hidden, unless they also end a text."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad = kwargs.get("pad_token_id", getattr(config, "pad_token_id", None))
    end = kwargs.get("eos_token_id", getattr(config, "eos_token_id", None))
    if pad is None or tokens.is_floating_point() or tokens.dim() != 2:
        return None
    ends = end.tolist() if isinstance(end, Tensor) else end
    ends = ends if isinstance(ends, list | tuple) else [ends]
    mask = tokens != pad
    return None if int(pad) in ends or bool(mask.all()) else mask.to(torch.int64)


def describe_generation(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Generation:
    """What a call of ``generate`` says about its prompts; takes the explicit arguments out of ``kwargs``."""
    explicit = take_explicit(kwargs)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Generation(
            None, None, explicit
        )  # the encoder's call brings its own mask; the decoder's first call is its prompt
    tokens = next((kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)), args[0] if args else None)
    if isinstance(kwargs.get("inputs_embeds"), Tensor):
        tokens = kwargs["inputs_embeds"]
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return Generation(None, None, explicit)
    mask = kwargs.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = _mask_from_padding(model, tokens, kwargs)
    # continued from a cache, the mask spans what the cache holds and what is new
    width = tokens.shape[1] if mask is None else max(mask.shape[1], tokens.shape[1])
    return Generation(mask, width, explicit)


class Generate:
    """Stands in for an edited model's ``generate``: the same call, with the prompt known to the hooks.

    An object and not a closure, so that a copied or pickled model gets one that refers to the copy.
    """

    def __init__(self, model: nn.Module, editor: Editor, replaced: Any) -> None:
        self.model = model
        self.editor = editor
        self.replaced = replaced

    @property
    def __wrapped__(self) -> Any:
        return self.replaced if self.replaced is not None else type(self.model).generate.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.editor.generation
        self.editor.generation = describe_generation(self.model, args, kwargs)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            self.editor.generation = before
