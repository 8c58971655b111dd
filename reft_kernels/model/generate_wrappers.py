"""Wrappers of ``generate`` and ``prepare_inputs_for_generation`` that record the prompt."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from reft_kernels.model.generation import describe_generation
from reft_kernels.model.thread_state import EditorState


class HasState(Protocol):
    """The interface of the editor that the wrappers use."""

    @property
    def state(self) -> EditorState: ...


class Generate:
    """Replaces ``generate`` of a model: records the prompt, then calls the original.

    An object rather than a closure, so that a copied or pickled model refers to the copy.

    Args:
        model: the module whose ``generate`` is replaced.
        editor: the editor that stores the :class:`Generation`.
        replaced: the instance attribute that is replaced; None if it is the class's method.
    """

    name = "generate"

    def __init__(self, model: nn.Module, editor: HasState, replaced: Any) -> None:
        self.model = model
        self.editor = editor
        self.replaced = replaced

    @property
    def __wrapped__(self) -> Any:
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.model), self.name).__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = self.editor.state
        before = state.generation
        state.generation = describe_generation(self.model, args, kwargs, before)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            state.generation = before


class Prepare(Generate):
    """Replaces ``prepare_inputs_for_generation``: records the number of columns so far."""

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
