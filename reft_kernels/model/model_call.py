"""Reads the arguments of a model's call that determine the edited positions and the edits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from reft_kernels.model.scaling import Scaling

EXPLICIT = ("prompt_lengths", "edit_positions")
"""Keyword arguments that ``forward`` and ``generate`` of an edited model accept in addition.

prompt_lengths   integers ``[B]``: prompt tokens of each example, or of each packed sequence
edit_positions   columns to edit, integers ``[B, P]`` padded with -1, or a bool mask ``[B, T]``;
                 replaces the adapter's positions
"""
SCALES = ("subspaces", "strengths")
"""Further keyword arguments; see :class:`~reft_kernels.model.scaling.Scaling`.

subspaces        columns of the rank to write: a list, or one for each example
strengths        factors of the edits: a number, or one for each example
"""
_RECORDED = (
    "labels",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "decoder_attention_mask",
    "position_ids",
    "input_values",
    "input_features",
    "feature_attention_mask",
    "input_features_mask",
)


class ModelCall(NamedTuple):
    """Arguments that the user passed to the model.

    The backbone may receive them in another form, or not at all.
    """

    labels: Any = None
    prompt_lengths: Any = None
    edit_positions: Any = None
    scaling: Scaling | None = None
    input_ids: Any = None
    inputs_embeds: Any = None
    attention_mask: Any = None
    decoder_attention_mask: Any = None
    position_ids: Any = None
    input_values: Any = None
    input_features: Any = None
    feature_attention_mask: Any = None
    input_features_mask: Any = None

    @property
    def has_tokens(self) -> bool:
        """Whether the call has tokens; explicit positions then refer to them."""
        return isinstance(self.input_ids, Tensor) or isinstance(self.inputs_embeds, Tensor)

    @property
    def is_explicit(self) -> bool:
        """Whether the call has ``prompt_lengths`` or ``edit_positions``."""
        return self.prompt_lengths is not None or self.edit_positions is not None

    def with_explicit(self, other: ModelCall) -> ModelCall:
        """This call with the explicit arguments of another."""
        return self._replace(
            prompt_lengths=other.prompt_lengths,
            edit_positions=other.edit_positions,
            scaling=other.scaling,
        )

    @property
    def audio_mask(self) -> Tensor | None:
        """The attention mask ``[B, S]`` of an audio input, or None.

        Where the call has text too, ``attention_mask`` is the text's.
        """
        audio = isinstance(self.input_values, Tensor) or isinstance(self.input_features, Tensor)
        masks = [self.feature_attention_mask, self.input_features_mask]
        if not isinstance(self.input_ids, Tensor):
            masks.append(self.attention_mask)
        return next((m for m in masks if audio and isinstance(m, Tensor)), None)


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a module's ``forward``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(
        name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds
    )


def take_explicit(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove the explicit arguments from ``kwargs``; returns them as fields of ModelCall.

    Raises:
        TypeError, ValueError: ``subspaces`` or ``strengths`` are not valid.
    """
    explicit = {name: kwargs.pop(name) for name in EXPLICIT if name in kwargs}
    subspaces, strengths = (kwargs.pop(name, None) for name in SCALES)
    if subspaces is not None or strengths is not None:
        explicit["scaling"] = Scaling(subspaces, strengths)
    return explicit


def take_call(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> ModelCall:
    """Read the arguments of a call and remove the explicit ones from ``kwargs``.

    Args:
        names: names of the module's positional parameters.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call; modified.
    """
    explicit = take_explicit(kwargs)
    arguments: Mapping[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    return ModelCall(
        **{name: arguments[name] for name in _RECORDED if arguments.get(name) is not None},
        **explicit,
    )
