"""Search spaces: optuna distributions from flags or by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from reft_train.config import REFT_METHODS, Optimization, RunConfig, check
from reft_train.errors import UserError, one_line, wrong

Space = Mapping[str, BaseDistribution]
_REFT = ("layers", "positions", "share_weights", "component", "activation", "dropout", "init")
_LORA = ("rank", "layers", "dropout", "lora_alpha", "lora_targets")
_ORTHONORMAL = ("loreft", "direft", "consreft", "lobireft")
_OF_METHOD: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(REFT_METHODS, ("rank", *_REFT)),
    **dict.fromkeys(_ORTHONORMAL, ("rank", "parametrization", *_REFT)),
    **dict.fromkeys(("lora", "dora"), _LORA),
    **{"red": _REFT, "prefix": ("prefix_tokens",), "ia3": ("lora_targets",), "head": ()},
}
# learning rates span two decades for each method, so that budgets are comparable
_RATES = {"lora": (2e-5, 2e-3), "dora": (2e-5, 2e-3), "prefix": (1e-3, 1e-1), "ia3": (5e-4, 5e-2)}


def stored(value: Any) -> Any:
    """Convert a value for storage in optuna; a list becomes text such as "0;2;4"."""
    return ";".join(map(str, value)) if isinstance(value, list) else value


def restored(name: str, value: Any) -> Any:
    """Convert a value stored by optuna back to a setting's value."""
    if name == "lora_targets":
        return value.split(";") if value else []
    return check(name, value) if name == "layers" else value


def choices(values: Sequence[Any]) -> CategoricalDistribution:
    return CategoricalDistribution([stored(value) for value in values])


def varied(method: str) -> tuple[str, ...]:
    """Return the settings that a search can vary."""
    return (*_OF_METHOD[method], *Optimization.model_fields, "max_length")


def parse(entries: Sequence[str], method: str) -> Space:
    """Parse a space from entries NAME=[VALUE, ...] or NAME={low: VALUE, high: VALUE, log: true}."""
    space, possible = {}, varied(method)
    for entry in entries:
        name, equals, text = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise wrong("--vary", repr(entry), "NAME=VALUES such as rank=[4, 8]")
        if name not in possible:
            expected = f"settings that {method} can vary: {', '.join(possible)}"
            raise wrong("--vary", repr(name), expected)
        try:
            space[name] = _distribution(name, yaml.safe_load(text))
        except (TypeError, ValueError, yaml.YAMLError) as error:  # raised by optuna, too
            raise UserError(f"--vary: {entry}: {one_line(error)}") from None
    return space


def _distribution(name: str, value: Any) -> BaseDistribution:
    if isinstance(value, list):
        values = [stored(check(name, one)) for one in value]
        if not values or len(set(values)) < len(values):
            raise wrong(name, repr(value), "one or more values, each once")
        return CategoricalDistribution(values)
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        raise wrong(name, repr(value), "a list or {low: ..., high: ..., log: true}")
    low, high = check(name, value["low"]), check(name, value["high"])
    kind = {int: IntDistribution, float: FloatDistribution}.get(type(low))
    if kind is None or type(high) is not type(low):
        raise wrong(name, repr(value), "a list: this setting is not a number")
    if not low < high:
        raise wrong(name, repr(value), "low < high")
    return kind(low, high, log=value.get("log") is True)


def _size(hf_config: Any, name: str) -> int:
    return getattr(hf_config.get_text_config(), name, None) or 0


def layer_sets(hf_config: Any) -> CategoricalDistribution:
    """Return all layers, every second layer, and four evenly spaced ones as in the paper."""
    depth, sets = _size(hf_config, "num_hidden_layers"), ["all"]
    four = sorted({depth * (2 * part + 1) // 8 for part in range(4)})
    for numbers in (list(range(1, depth, 2)), four):
        if 0 < len(numbers) < depth and numbers not in sets:
            sets.append(numbers)
    return choices(sets)


def space_of(config: RunConfig, hf_config: Any, encoder: bool) -> Space:
    """Return the default space: rank, layers, positions, learning rate and method settings.

    Args:
        encoder: whether the model is an encoder, for which the paper edits the first 1, 3 or 11
            tokens.
    """
    positions = ("f1", "f3", "f11") if encoder else ("f1+l1", "f3+l3", "f5+l5", "f7+l7")
    if not config.share_weights:
        positions = tuple(spec for spec in positions if "+" in spec) or (config.positions,)
    space = {
        **small_space_of(config, hf_config),
        "layers": layer_sets(hf_config),
        "positions": choices(positions),
        "dropout": choices((0.0, 0.05, 0.1, 0.2)),
        "parametrization": choices(("householder", "cayley")),
    }
    return {name: entry for name, entry in space.items() if name in varied(config.method)}


def small_space_of(config: RunConfig, hf_config: Any) -> Space:
    """Return the space of a comparison: learning rate and the size of the method."""
    low, high = _RATES.get(config.method, (1e-4, 1e-2))
    width = _size(hf_config, "hidden_size") or 32
    space = {
        "lr": FloatDistribution(low, high, log=True),
        "rank": choices([rank for rank in (1, 2, 4, 8, 16, 32) if rank <= width]),
        "prefix_tokens": choices((5, 10, 20, 40)),
    }
    return {name: entry for name, entry in space.items() if name in varied(config.method)}
