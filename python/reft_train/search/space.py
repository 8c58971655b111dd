"""What a search varies: for each setting its choices or its range, from a YAML file, from flags,
or a method's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_train.config import REFT_METHODS, check
from reft_train.errors import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

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


@dataclass(frozen=True)
class Choices:
    """A few values, in any order."""

    values: tuple[Any, ...]

    def suggest(self, trial: Trial, name: str) -> Any:
        """One of the values."""
        values = {stored(value): value for value in self.values}
        return values[trial.suggest_categorical(name, list(values))]

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one of them."""
        return value in self.values

    def plain(self) -> dict[str, Any]:
        """As the YAML file says it."""
        return {
            "choices": [list(value) if isinstance(value, list) else value for value in self.values]
        }


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; ``log``: evenly by magnitude; ``step``:
    low, low + step, ...
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    def suggest(self, trial: Trial, name: str) -> int | float:
        """A number of the range."""
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def holds(self, value: Any) -> bool:
        """Whether ``value`` lies in the range, on a step where it has steps."""
        if not isinstance(value, type(self.low)) or not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(
            (value - self.low) / self.step, round((value - self.low) / self.step)
        )

    def plain(self) -> dict[str, Any]:
        """As the YAML file says it."""
        extra = {"log": True} if self.log else {"step": self.step} if self.step is not None else {}
        return {"low": self.low, "high": self.high, **extra}


Space = Mapping[str, Choices | Range]


def stored(value: Any) -> Any:
    """A value as optuna stores it: a list as text, such as "0;2;4"."""
    return ";".join(map(str, value)) if isinstance(value, list) else value


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """Settings of a trial."""
    return {name: entry.suggest(trial, name) for name, entry in space.items()}


def plain(space: Space) -> dict[str, dict[str, Any]]:
    """The space as :func:`parse` takes it."""
    return {name: entry.plain() for name, entry in space.items()}


def varied(method: str) -> tuple[str, ...]:
    """The settings that a search can vary for a method. Data, seed and held-out rows are none:
    trials must be comparable.
    """
    return (*_OF_METHOD[method], *_OPTIMIZATION)


def read(path: str | Path, method: str) -> dict[str, Choices | Range]:
    """The space of a YAML file.

    Raises:
        UserError: a file that cannot be read, or as :func:`parse`.
    """
    import yaml

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


def parse_flags(texts: Sequence[str], method: str) -> dict[str, Choices | Range]:
    """The entries of ``--vary NAME=YAML`` flags.

    Raises:
        UserError: as :func:`parse`.
    """
    import yaml

    values = {}
    for text in texts:
        name, equals, entry = text.partition("=")
        if not equals:
            raise UserError(f"--vary: got {text!r}, expected NAME=VALUES such as rank=[4, 8]")
        try:
            values[name.strip().replace("-", "_")] = yaml.safe_load(entry)
        except yaml.YAMLError:
            raise UserError(
                f"--vary: got {text!r}, expected a list, or a mapping with low and high"
            ) from None
    return parse(values, method, "--vary")


def parse(values: Any, method: str, where: str) -> dict[str, Choices | Range]:
    """A space from plain values: a setting's name with a list, ``{choices: [...]}`` or ``{low,
    high, log, step}``.

    Raises:
        UserError: no mapping, settings that the method does not have or a search cannot vary,
            values out of their range.
    """
    if not isinstance(values, Mapping) or not values:
        raise UserError(
            f"{where}: got {values!r}, expected a mapping of settings to choices or ranges"
        )
    possible = varied(method)
    for name in values:
        if name not in possible:
            raise UserError(
                f"{where}: got {name!r}, expected settings that {method} can vary: "
                f"{', '.join(possible)}"
            )
    return {name: _entry(name, value, where) for name, value in values.items()}


def _entry(name: str, value: Any, where: str) -> Choices | Range:
    if isinstance(value, Mapping) and set(value) == {"choices"}:
        value = value["choices"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _choices(name, value, where)
    if isinstance(value, Mapping) and {"low", "high"} <= set(value) <= {
        "low",
        "high",
        "log",
        "step",
    }:
        return _range(name, value, where)
    raise UserError(
        f"{where}: {name}: got {value!r}, expected a list, {{choices: [...]}} or "
        f"{{low, high, log, step}}"
    )


def _choices(name: str, values: Sequence[Any], where: str) -> Choices:
    try:
        checked = [check(name, value) for value in values]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not checked or len({str(stored(value)) for value in checked}) < len(checked):
        raise UserError(
            f"{where}: {name}: got {list(values)!r}, expected one or more values, each once"
        )
    return Choices(tuple(checked))


def _range(name: str, value: Mapping[str, Any], where: str) -> Range:
    try:
        low, high = check(name, value["low"]), check(name, value["high"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    log, step = value.get("log", False), value.get("step")

    def wrong(expected: str) -> UserError:
        return UserError(f"{where}: {name}: got {dict(value)!r}, expected {expected}")

    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise wrong("choices: this setting is no number")
    if not low < high:
        raise wrong("low < high")
    if not isinstance(log, bool) or (log and low <= 0):
        raise wrong("log true or false, and low > 0 with log")
    if step is not None:
        step = _step(step, isinstance(low, int))
        if log or step is None or step > high - low:
            raise wrong("a step > 0, at most high - low, without log, whole for a whole number")
    return Range(low, high, log, step)


def _step(step: Any, whole: bool) -> int | float | None:
    try:
        number = None if isinstance(step, bool) else float(step)  # YAML reads 1e-4 as text
    except (TypeError, ValueError):
        return None
    if (
        number is None
        or not (math.isfinite(number) and number > 0)
        or (whole and number != int(number))
    ):
        return None
    return int(number) if whole else number
