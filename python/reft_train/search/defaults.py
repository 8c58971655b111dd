"""The spaces that a search starts from where the user names none."""

from __future__ import annotations

from typing import Any

from reft_train.config import REFT_METHODS, RunConfig
from reft_train.search.space import Choices, Range, varied

LEARNING_RATES = {
    "lora": (2e-5, 2e-3),
    "dora": (2e-5, 2e-3),
    "prefix": (1e-3, 1e-1),
    "ia3": (5e-4, 5e-2),
}
"""Two decades for each method, so that a trial covers as much of one as of another; the others' are ``REFT_RATES``."""
REFT_RATES = (1e-4, 1e-2)
_RANKS = (1, 2, 4, 8, 16, 32)
_DROPOUTS = (0.0, 0.05, 0.1, 0.2)


def rate(method: str) -> Range:
    """Learning rates of a method."""
    return Range(*LEARNING_RATES.get(method, REFT_RATES), log=True)


def ranks(hf_config: Any) -> Choices:
    """Powers of two up to 32 that the model's width allows."""
    width = getattr(_text(hf_config), "hidden_size", None) or _RANKS[-1]
    return Choices(tuple(rank for rank in _RANKS if rank <= width))


def layer_sets(hf_config: Any) -> Choices:
    """All layers, every second one, and four spread evenly (the paper's 2;10;18;26 in kind)."""
    depth = getattr(_text(hf_config), "num_hidden_layers", None) or 0
    sets: list[Any] = ["all"]
    for numbers in (
        list(range(1, depth, 2)),
        sorted({depth * (2 * part + 1) // 8 for part in range(4)}),
    ):
        if 0 < len(numbers) < depth and numbers not in sets:
            sets.append(numbers)
    return Choices(tuple(sets))


def space_of(config: RunConfig, hf_config: Any, encoder: bool) -> dict[str, Choices | Range]:
    """Rank, layers, positions, learning rate, dropout and parametrization, as far as the method has
    them.

    Args:
        hf_config: the model's configuration; it bounds ranks and layers.
        encoder: the model reads whole texts, where the paper edits the first 1, 3 or 11 tokens.
    """
    positions = ("f1", "f3", "f11") if encoder else ("f1+l1", "f3+l3", "f5+l5", "f7+l7")
    if not config.share_weights:
        positions = tuple(spec for spec in positions if "+" in spec) or (config.positions,)
    space: dict[str, Choices | Range] = {
        "lr": rate(config.method),
        "rank": ranks(hf_config),
        "layers": layer_sets(hf_config),
        "positions": Choices(positions),
        "dropout": Choices(_DROPOUTS),
        "parametrization": Choices(("householder", "cayley")),
        "prefix_tokens": Choices((5, 10, 20, 40)),
    }
    return {name: entry for name, entry in space.items() if name in varied(config.method)}


def small_space_of(config: RunConfig, hf_config: Any) -> dict[str, Choices | Range]:
    """Learning rate and what sets a method's size: the space of a comparison."""
    space: dict[str, Choices | Range] = {"lr": rate(config.method)}
    if config.method in REFT_METHODS or config.method in ("lora", "dora"):
        space["rank"] = ranks(hf_config)
    space["prefix_tokens"] = Choices((5, 10, 20, 40))
    return {name: entry for name, entry in space.items() if name in varied(config.method)}


def _text(hf_config: Any) -> Any:
    return hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
