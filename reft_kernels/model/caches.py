"""Reads the length of a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "state", "mems")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's arguments, or None."""
    return next((arguments[name] for name in _CACHES if arguments.get(name) is not None), None)


def is_paged(arguments: Mapping[str, Any]) -> bool:
    """Whether a call is a step of continuous batching, with tokens of several requests."""
    return type(arguments.get("cache")).__name__ == "PagedAttentionCache"


def cached_columns(cache: Any, arguments: Mapping[str, Any]) -> int | Tensor | None:
    """Number of sequence columns in a cache.

    Args:
        cache: a transformers cache, a tuple of (key, value) pairs or of recurrent states.
        arguments: the arguments of the backbone's call, by name.

    Returns:
        A Python int, or an integer tensor if the cache counts on its device. None if the cache
        has recurrent or state-space states, whose length is unknown.
    """
    if isinstance(cache, tuple | list):
        first = cache[0] if cache else None
        return (
            first[0].shape[-2]
            if isinstance(first, tuple | list) and isinstance(first[0], Tensor)
            else None
        )
    if torch.compiler.is_compiling():
        return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", None)
    for holder in layers if layers else (cache,):  # the first layers of a hybrid may be stateful
        count = _sequence_length(holder)
        if isinstance(count, Tensor) or count:
            return count
    if _holds_states(cache) or any(_holds_states(layer) for layer in layers or ()):
        return None
    position = arguments.get("cache_position")
    if (
        not layers
        and not hasattr(cache, "get_seq_length")
        and isinstance(position, Tensor)
        and position.numel()
    ):
        return int(position[0])
    return 0


def _sequence_length(holder: Any) -> int | Tensor:
    count = getattr(holder, "get_seq_length", None)
    if count is None:
        return 0
    try:
        return count()
    except ValueError:  # transformers raises it for a cache of state-space layers only
        return 0


def _holds_states(holder: Any) -> bool:
    """Whether a state-space model's part of a cache has been written."""
    state = getattr(holder, "has_previous_state", False)
    if isinstance(state, dict):
        state = any(state.values())
    elif callable(state):
        state = False  # a method of the whole cache; cached_columns checks each layer
    return bool(state) or bool(getattr(holder, "linear_cache", None))
