"""Tells the tokens of one modality from others by the placeholders in a model's configuration.

A vision-language or audio-language model puts the features of an image, a video or an audio input
at placeholder tokens among the text. Their ids are in its configuration: ``image_token_id`` or
``image_token_index``, and likewise for the others. Tokens that mark where an image starts, ends or
breaks a line have ids of their own and count as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reft_kernels.model.components import Component
from reft_kernels.model.towers import of_modality
from reft_kernels.positions import MODALITIES, Spec

_PLACEHOLDERS = tuple(name for name in MODALITIES if name != "text")


class CountedTokens(NamedTuple):
    """The tokens among which positions are counted.

    Attributes:
        modality: "text", "image", "video" or "audio".
        ids: the placeholders of the modality; for text, those of all modalities.
    """

    modality: str
    ids: tuple[int, ...]

    def mask(self, ids: Tensor) -> Tensor:
        """Mask of the counted tokens, bool of the shape of the token ids ``ids``."""
        placeholder = torch.zeros_like(ids, dtype=torch.bool)
        for number in self.ids:
            placeholder = placeholder | (ids == number)
        return ~placeholder if self.modality == "text" else placeholder

    @property
    def unknown(self) -> ValueError:
        """The error of a call whose token ids are not known."""
        return ValueError(
            f"positions: {self.modality} tokens are told from others by input_ids, which this call "
            "lacks for the whole prompt; pass input_ids of the prompt, or edit_positions="
        )


def counted_tokens(model: nn.Module, spec: Spec, component: Component) -> CountedTokens | None:
    """The tokens that a spec counts in a model; None for all.

    Raises:
        ValueError: the model's configuration does not name the placeholders, or the rows of the
            component are not tokens.
    """
    name = spec.modality
    if name is None:
        return None
    for target in component.targets:
        if target.stream == "own":
            raise ValueError(
                f"positions: got {name!r} tokens for {target.path}, whose rows are not tokens; "
                "expected positions without a modality"
            )
    found = placeholder_ids(getattr(model, "config", None))
    if name != "text":
        if name not in found:
            raise ValueError(
                f"positions: got {name!r} tokens, but the model's configuration names no "
                f"{name}_token_id; it names those of {', '.join(found) or 'no modality'}"
            )
        return CountedTokens(name, found[name])
    if not found and any(of_modality(path) for path, _ in model.named_modules() if path):
        raise ValueError(
            "positions: got 'text' tokens, but the model's configuration names no placeholder of "
            "its other inputs (image_token_id, ...); expected positions without a modality"
        )
    return CountedTokens(name, tuple(sorted({n for ids in found.values() for n in ids})))


def placeholder_ids(config: Any) -> dict[str, tuple[int, ...]]:
    """The placeholder ids of each modality in a configuration, else in those nested in it."""
    fields = vars(config) if hasattr(config, "__dict__") else {}
    found = {name: ids for name in _PLACEHOLDERS if (ids := _ids(fields, name))}
    if not found:
        for nested in fields.values():
            if hasattr(nested, "model_type"):
                found |= placeholder_ids(nested)
    return found


def _ids(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    for key in (f"{name}_token_id", f"{name}_token_index"):
        value = fields.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return (value,)
    return ()
