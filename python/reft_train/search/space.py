"""Search spaces: optuna distributions from a YAML file, from flags, or by default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from reft_train.config import REFT_METHODS, Optimization, RunConfig, check, read_mapping
from reft_train.errors import UserError, wrong

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


def parse_flags(texts: Sequence[str], method: str) -> Space:
    values = {}
    for text in texts:
        name, equals, entry = text.partition("=")
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(entry)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise wrong("--vary", repr(text), "NAME=VALUES such as rank=[4, 8]")
    return parse(values, method, "--vary")


def read(path: str | Path, method: str) -> Space:
    return parse(read_mapping(path, "--space"), method, f"--space {path}")


def parse(values: Mapping[str, Any], method: str, where: str) -> Space:
    """Parse a space from names with a list, ``{choices: [...]}`` or ``{low, high, log, step}``."""
    space, possible = {}, varied(method)
    for name, value in values.items():
        if name not in possible:
            expected = f"settings that {method} can vary: {', '.join(possible)}"
            raise wrong(where, repr(name), expected)
        try:
            space[name] = _entry(name, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (TypeError, ValueError, AttributeError) as error:  # raised by optuna
            raise UserError(f"{where}: {name}: got {value!r}: {error}") from None
    if not space:
        raise wrong(where, "nothing", "a mapping of settings to choices or ranges")
    return space


def _entry(name: str, value: Any) -> BaseDistribution:
    if isinstance(value, Mapping) and set(value) == {"choices"}:
        value = value["choices"]
    if isinstance(value, list):
        values = [check(name, one) for one in value]
        if not values or len({str(stored(one)) for one in values}) < len(values):
            raise wrong(name, repr(value), "one or more values, each once")
        return choices(values)
    keys = set(value) if isinstance(value, Mapping) else set()
    if not {"low", "high"} <= keys <= {"low", "high", "log", "step"}:
        raise wrong(name, repr(value), "a list, {choices: [...]} or {low, high, log, step}")
    low, high = check(name, value["low"]), check(name, value["high"])
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise wrong(name, repr(value), "choices: this setting is not a number")
    # YAML reads 1e-4 as a string
    step = None if value.get("step") is None else float(value["step"])
    options = {"low": low, "high": high, "log": value.get("log", False)}
    if not low < high or not isinstance(options["log"], bool) or (step or 1e-12) <= 0:
        raise wrong(name, repr(value), "low < high, log true or false, step > 0")
    if isinstance(low, float):
        return FloatDistribution(**options, step=step)
    if step is not None and step != int(step):
        raise wrong(name, repr(value), "a whole step")
    return IntDistribution(**options, step=int(step or 1))


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
