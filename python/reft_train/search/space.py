"""Search spaces: optuna distributions from a YAML file, from flags, or by default."""

from __future__ import annotations

import math
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

from reft_train.config import REFT_METHODS, RunConfig, check
from reft_train.errors import UserError

Space = Mapping[str, BaseDistribution]
_OPTIMIZATION = (
    "lr",
    "head_lr",
    "weight_decay",
    "warmup",
    "schedule",
    "max_grad_norm",
    "epochs",
    "max_steps",
    "batch_size",
    "accumulation",
    "max_length",
)
_REFT = ("layers", "positions", "share_weights", "component", "activation", "dropout", "init")
_LORA = ("rank", "layers", "dropout", "lora_alpha", "lora_targets")
_OF_METHOD: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(REFT_METHODS, ("rank", *_REFT)),
    **dict.fromkeys(
        ("loreft", "direft", "consreft", "lobireft"), ("rank", "parametrization", *_REFT)
    ),
    "red": _REFT,
    "lora": _LORA,
    "dora": _LORA,
    "prefix": ("prefix_tokens",),
    "ia3": ("lora_targets",),
    "head": (),
}
# learning rates span two decades for each method, so that budgets are comparable
_RATES = {"lora": (2e-5, 2e-3), "dora": (2e-5, 2e-3), "prefix": (1e-3, 1e-1), "ia3": (5e-4, 5e-2)}
_RANKS = (1, 2, 4, 8, 16, 32)


def stored(value: Any) -> Any:
    """Convert a value for storage in optuna; a list becomes text such as "0;2;4"."""
    return ";".join(map(str, value)) if isinstance(value, list) else value


def restored(name: str, value: Any) -> Any:
    """Convert a value stored by optuna back to a setting's value."""
    if name == "lora_targets":
        return value.split(";") if value else []
    return list(map(int, value.split(";"))) if name == "layers" and value != "all" else value


def choices(values: Sequence[Any]) -> CategoricalDistribution:
    """Create a categorical distribution."""
    return CategoricalDistribution([stored(value) for value in values])


def holds(entry: BaseDistribution, value: Any) -> bool:
    """Whether a distribution contains a value."""
    if isinstance(entry, CategoricalDistribution):
        return stored(value) in entry.choices
    if not isinstance(value, int | float) or not entry.low <= value <= entry.high:
        return False
    steps = 0.0 if entry.step is None else (value - entry.low) / entry.step
    return math.isclose(steps, round(steps))


def varied(method: str) -> tuple[str, ...]:
    """Return the settings that a search can vary.

    Data, seed and held-out rows are excluded, so that trials are comparable.
    """
    return (*_OF_METHOD[method], *_OPTIMIZATION)


def read(path: str | Path, method: str) -> Space:
    """Read a search space from a YAML file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--space: got {path}, which does not exist, expected a YAML file"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--space: got {path}, which is not YAML ({' '.join(str(error).split())})"
        ) from None
    return parse(values, method, f"--space {path}")


def parse_flags(texts: Sequence[str], method: str) -> Space:
    """Parse ``--vary NAME=YAML`` flags."""
    values = {}
    for text in texts:
        name, equals, entry = text.partition("=")
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(entry)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"--vary: got {text!r}, expected NAME=VALUES such as rank=[4, 8]")
    return parse(values, method, "--vary")


def parse(values: Any, method: str, where: str) -> Space:
    """Parse a space from names with a list, ``{choices: [...]}`` or ``{low, high, log, step}``."""
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f"{where}: got {values!r}, expected a mapping of settings to choices or ranges"
        )
    for name in values:
        if name not in (possible := varied(method)):
            names = ", ".join(possible)
            raise UserError(
                f"{where}: got {name!r}, expected settings that {method} can vary: {names}"
            )
    space = {}
    for name, value in values.items():
        try:
            space[name] = _entry(name, value)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (TypeError, ValueError) as error:  # raised by optuna
            raise UserError(f"{where}: {name}: got {value!r}: {error}") from None
    return space


def _entry(name: str, value: Any) -> BaseDistribution:
    if isinstance(value, Mapping) and set(value) == {"choices"}:
        value = value["choices"]
    if isinstance(value, list):
        values = [check(name, one) for one in value]
        if not values or len({str(stored(one)) for one in values}) < len(values):
            raise UserError(f"{name}: got {value!r}, expected one or more values, each once")
        return choices(values)
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value) <= {
        "low",
        "high",
        "log",
        "step",
    }:
        forms = "a list, {choices: [...]} or {low, high, log, step}"
        raise UserError(f"{name}: got {value!r}, expected {forms}")
    low, high, step = check(name, value["low"]), check(name, value["high"]), value.get("step")
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise UserError(f"{name}: got {value!r}, expected choices: this setting is no number")
    whole, log = isinstance(low, int), value.get("log", False)
    step = (1 if whole else None) if step is None else float(step)  # YAML parses 1e-4 as a string
    if (
        not low < high
        or not isinstance(log, bool)
        or (step is not None and not 0 < step <= high - low)
    ):
        raise UserError(
            f"{name}: got {value!r}, expected low < high, log true or false, 0 < step <= high - low"
        )
    if not whole:
        return FloatDistribution(low, high, log=log, step=step)
    if step != int(step):
        raise UserError(f"{name}: got {value!r}, expected a whole step")
    return IntDistribution(low, high, log=log, step=int(step))


def ranks(hf_config: Any) -> CategoricalDistribution:
    """Return the powers of two up to 32 that the model's width allows."""
    width = getattr(hf_config.get_text_config(), "hidden_size", None) or _RANKS[-1]
    return choices([rank for rank in _RANKS if rank <= width])


def layer_sets(hf_config: Any) -> CategoricalDistribution:
    """Return all layers, every second layer, and four evenly spaced ones as in the paper."""
    depth = getattr(hf_config.get_text_config(), "num_hidden_layers", None) or 0
    sets: list[Any] = ["all"]
    for numbers in (
        list(range(1, depth, 2)),
        sorted({depth * (2 * part + 1) // 8 for part in range(4)}),
    ):
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
    space = {
        "lr": FloatDistribution(low, high, log=True),
        "rank": ranks(hf_config),
        "prefix_tokens": choices((5, 10, 20, 40)),
    }
    return {name: entry for name, entry in space.items() if name in varied(config.method)}
