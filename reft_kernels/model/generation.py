"""``generate``: keeps what a prompt is while a model sees it chunk by chunk, beam by beam and
token by token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from reft_kernels.model.call_state import EXPLICIT, ModelCall
from reft_kernels.model.response_rule import Occurrences, Template, find_template

if TYPE_CHECKING:
    from reft_kernels.model.editor import Editor

_INPUTS = ("input_ids", "inputs", "inputs_embeds")


class Generation:
    """What a running ``generate`` was called with: the whole prompt, of which a forward may see a
    part.

    Args:
        mask: ``[B, width]`` of the whole prompt, None where all tokens are real or where only the
            model's calls tell.
        width: columns of the whole prompt; None for a decoder whose first call brings it. text:
        token ids ``[B, n]`` that were passed, the last n of ``width`` columns; None where
        embeddings were.
        cached: columns that a cache held when it started.
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
        self.total: int | None = None  # columns up to the end of the model's next call
        self.announced = (
            False  # a call of the model is being prepared: the next one is generate's own
        )
        self.is_first = True  # no call of the backbone has come yet
        self._found: dict[Template, Occurrences] = {}

    def offset(self, width: int) -> int | None:
        """Column at which a forward of ``width`` tokens starts; None where generate's own
        bookkeeping does not tell.
        """
        if self.total is None or width > self.total:
            return None
        return self.total - width

    def prepare(self, input_ids: Any, kwargs: dict[str, Any], encoder_decoder: bool) -> None:
        """Note how many columns the next call of the model ends with, from what it is prepared
        with.
        """
        self.announced = True
        mask = kwargs.get("attention_mask")
        if not encoder_decoder and isinstance(mask, Tensor) and mask.dim() == 2:
            self.total = mask.shape[1]  # of all columns so far, whatever part of them is passed
        elif isinstance(input_ids, Tensor) and input_ids.dim() >= 2:
            unseen = (
                0 if self.width is None or self.text is None else self.width - self.text.shape[1]
            )
            self.total = input_ids.shape[1] + unseen
            embeds = kwargs.get("inputs_embeds")
            if not encoder_decoder and isinstance(embeds, Tensor):
                self.total = embeds.shape[1] + input_ids.shape[1]

    def occurrences(
        self, template: Template, batch: int, device: torch.device
    ) -> Occurrences | None:
        """Where ``template`` ends in the prompt, for each row of a batch of beams; None where
        the whole text is not known.
        """
        if self.text is None or self.text.shape[1] != self.width:
            return None
        if template not in self._found:
            text = (
                self.text
                if self.mask is None
                else torch.where(self.mask.to(self.text.device) != 0, self.text, -1)
            )
            self._found[template] = find_template(text, template)
        found = self._found[template]
        repeats = max(1, batch // found.last.shape[0])
        return Occurrences(*(t.repeat_interleave(repeats, dim=0).to(device) for t in found))


def _mask_from_padding(model: nn.Module, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that transformers infers where none is given: padding tokens are hidden, unless
    they also end a text.
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
    """What a call of ``generate`` says about its prompts; takes the explicit arguments out of
    ``kwargs``.

    Args:
        around: the generation of a model around this one, whose explicit arguments hold here too.
    """
    call = ModelCall(**{name: kwargs.pop(name) for name in EXPLICIT if name in kwargs})
    if around is not None and not call.is_explicit:
        call = call._replace(
            prompt_lengths=around.call.prompt_lengths, edit_positions=around.call.edit_positions
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # the encoder's call brings its own mask; the decoder's first call is its prompt
        return Generation(None, None, call)
    tokens = next(
        (kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)),
        args[0] if args else None,
    )
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
    # continued from a cache, the mask spans what the cache holds and what is new
    width = tokens.shape[1] if mask is None else max(mask.shape[1], tokens.shape[1])
    if around is not None and around.text is not None:
        if text is None and around.text.shape == tokens.shape[:2]:
            text = around.text
        elif text is not None and _continues(
            text, around.text
        ):  # the model drafts for itself: the prompt stays what it was
            return Generation(
                around.mask,
                around.width,
                call,
                text=around.text,
                cache=kwargs.get("past_key_values"),
            )
    return Generation(mask, width, call, text=text, cache=kwargs.get("past_key_values"))


def _continues(text: Tensor, prompt: Tensor) -> bool:
    batch, width = prompt.shape
    return (
        text.shape[0] == batch
        and text.shape[1] > width
        and bool((text[:, :width] == prompt.to(text.device)).all())
    )


class Generate:
    """Stands in for an edited model's ``generate``: the same call, with the prompt known to the
    hooks.

    An object and not a closure, so that a copied or pickled model gets one that refers to the copy.
    """

    name = "generate"

    def __init__(self, model: nn.Module, editor: Editor, replaced: Any) -> None:
        self.model = model
        self.editor = editor
        self.replaced = replaced

    @property
    def __wrapped__(self) -> Any:
        return (
            self.replaced
            if self.replaced is not None
            else getattr(type(self.model), self.name).__get__(self.model)
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.editor.state
        before = state.generation
        state.generation = describe_generation(self.model, args, kwargs, before)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            state.generation = before


class Prepare(Generate):
    """Stands in for ``prepare_inputs_for_generation``, whose arguments tell how many columns
    there are by now.
    """

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = self.editor.state.generation
        if generation is not None:
            input_ids = args[0] if args else kwargs.get("input_ids")
            encoder_decoder = bool(
                getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
            )
            generation.prepare(input_ids, kwargs, encoder_decoder)
        return self.__wrapped__(*args, **kwargs)
