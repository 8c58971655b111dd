"""State that belongs to one call of a model: kept for each thread, and as a stack for nested
calls.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from reft_kernels.model.forward_context import ForwardContext
    from reft_kernels.model.generation import Generation

EXPLICIT = ("prompt_lengths", "edit_positions")
"""Keyword arguments of the edited model's ``forward`` and ``generate``, not passed on to it.


prompt_lengths   integers ``[B]``: prompt tokens of each example, or of each packed sequence
edit_positions   columns to edit, integers ``[B, P]`` padded by -1 or a bool mask ``[B, T]``;
                 replaces the adapter's positions
"""
_SEEN = (
    "labels",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "decoder_attention_mask",
    "position_ids",
    "input_values",
    "input_features",
)


class ModelCall(NamedTuple):
    """What a user passed to the model itself. A backbone inside it may get these in another form,
    or not at all.
    """

    labels: Any = None
    prompt_lengths: Any = None
    edit_positions: Any = None
    input_ids: Any = None
    inputs_embeds: Any = None
    attention_mask: Any = None
    decoder_attention_mask: Any = None
    position_ids: Any = None
    input_values: Any = None
    input_features: Any = None

    @property
    def has_tokens(self) -> bool:
        """Whether the call names tokens, which explicit positions then count."""
        return isinstance(self.input_ids, Tensor) or isinstance(self.inputs_embeds, Tensor)

    @property
    def is_explicit(self) -> bool:
        """Whether the caller said which positions to edit, or where prompts end."""
        return self.prompt_lengths is not None or self.edit_positions is not None

    @property
    def audio_mask(self) -> Tensor | None:
        """The mask ``[B, S]`` of an audio input's samples or frames."""
        audio = isinstance(self.input_values, Tensor) or isinstance(self.input_features, Tensor)
        return self.attention_mask if audio and isinstance(self.attention_mask, Tensor) else None


def take_call(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> ModelCall:
    """Read a call's arguments, and remove the explicit ones from ``kwargs``.

    Args:
        names: of the module's positional parameters.
    """
    taken = {name: kwargs.pop(name) for name in EXPLICIT if name in kwargs}
    given: Mapping[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    return ModelCall(
        **{name: given[name] for name in _SEEN if given.get(name) is not None}, **taken
    )


class Frame:
    """One running call of a backbone: the context that its layer hooks consume, and the frame
    around it.
    """

    __slots__ = ("context", "outer")

    def __init__(self, outer: Frame | None) -> None:
        self.context: ForwardContext | None = None
        self.outer = outer


class EditorState(threading.local):
    """The running call of an editor's model, in one thread."""

    def __init__(
        self,
    ) -> None:  # runs once in each thread; torch.compile guards on the instance's own attributes
        self.call: ModelCall | None = None
        self.outer: list[ModelCall | None] = []
        self.generation: Generation | None = None
        self.members: tuple[str, ...] | None = None


class SessionState(threading.local):
    """The running call of a backbone, in one thread."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
