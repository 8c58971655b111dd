"""Wrappers of ``generate`` and ``prepare_inputs_for_generation`` that record the prompt."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from reft_kernels.model.generation import describe_generation
from reft_kernels.model.prompt_checks import PromptChecks
from reft_kernels.model.thread_state import ANNOUNCED, NOT_QUIET, EditorState

NO_CONTINUOUS_BATCHING = (
    "got a model with active ReFT adapters, expected none: continuous batching does not tell the "
    "model where the prompts of its requests end, which the edited positions are counted from; "
    "call generate with a padded batch and adapter_names=[...], or disable the adapters"
)


class GeneratingEditor(Protocol):
    """The interface of the editor that the wrappers use."""

    model: nn.Module
    checks: PromptChecks

    @property
    def state(self) -> EditorState: ...

    def edits_prompts_only(self) -> bool:
        """Whether a decode step of ``generate`` edits nothing."""

    def edits_something(self) -> bool:
        """Whether a forward that starts now has active adapters."""


class Generate:
    """Replaces ``generate`` of a model: records the prompt, then calls the original.

    An object rather than a closure, so that a copied or pickled model refers to the copy.

    Args:
        model: the module whose ``generate`` is replaced.
        editor: the editor that stores the :class:`Generation`.
        replaced: the instance attribute that is replaced; None if it is the class's method.
    """

    name = "generate"

    def __init__(self, model: nn.Module, editor: GeneratingEditor, replaced: Any) -> None:
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
        before, quiet = state.generation, state.quiet
        state.generation = describe_generation(self.model, args, kwargs, before)
        state.quiet = NOT_QUIET
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            state.generation, state.quiet = before, quiet


class Prepare(Generate):
    """Replaces ``prepare_inputs_for_generation``: records the number of columns so far.

    Announces decode steps that edit nothing.
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
        inputs = self.__wrapped__(*args, **kwargs)
        if (
            generation is not None
            and self.model is self.editor.model
            and generation.is_past_prompt(inputs)
            and not torch.is_grad_enabled()
            and self.editor.edits_prompts_only()
        ):
            generation.announced = False  # the model's hooks read this instead
            self.editor.state.quiet = ANNOUNCED
            self.editor.checks.deferred.poll()
        return inputs


class ContinuousBatching(Generate):
    """Replaces a method that starts transformers' continuous batching: refuses active adapters.

    Its forwards pack tokens of several requests, prompts and generated ones, and tell the model
    neither which tokens are whose nor where prompts end.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.editor.edits_something():
            raise ValueError(f"{self.name}: {NO_CONTINUOUS_BATCHING}")
        return self.__wrapped__(*args, **kwargs)


class GenerateBatch(ContinuousBatching):
    name = "generate_batch"


class InitContinuousBatching(ContinuousBatching):
    name = "init_continuous_batching"
