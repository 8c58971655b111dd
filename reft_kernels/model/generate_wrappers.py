"""Wrappers of a model's ``generate`` that record the prompt for the hooks."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from reft_kernels.model.generation import describe_generation
from reft_kernels.model.thread_state import EditorState


class HasState(Protocol):
    """The owner of the calls' state: an editor."""

    state: EditorState


class Generate:
    """Stands in for an edited model's ``generate``: the same call, with the prompt known to the
    hooks.

    An object and not a closure, so that a copied or pickled model gets one that refers to the copy.
    """

    name = "generate"

    def __init__(self, model: nn.Module, editor: HasState, replaced: Any) -> None:
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
