"""Command line flags for a run's settings, one for each field of ``RunConfig``."""

from __future__ import annotations

import argparse
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reft_train.config import FIELDS, TYPES, RunConfig, build, read_yaml
from reft_train.errors import UserError


def _parser(kind: Callable[[str], Any], expected: str, holds: Callable[[Any], bool]) -> Callable:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


def count(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return an argparse type for integers from ``low`` to ``high``."""
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    return _parser(int, expected, lambda value: low <= value <= (value if high is None else high))


SEED = count(0, 2**31 - 1)
rate = _parser(float, "a number > 0", lambda value: math.isfinite(value) and value > 0)


def _layers(text: str) -> str | list[int]:
    numbers = "all" if text.strip() == "all" else sorted(map(int, re.split("[;,]", text)))
    if numbers != "all" and (numbers[0] < 0 or len(set(numbers)) < len(numbers)):
        raise ValueError
    return numbers


layers = _parser(_layers, "'all' or layer numbers such as 0;2;4, each once", lambda value: True)


def _options(name: str) -> dict[str, Any]:
    hint, choices = TYPES[name], FIELDS[name].metadata.get("choices")
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if name == "layers":
        return {"type": layers, "metavar": "LIST"}
    if any(typing.get_origin(kind) is list for kind in kinds):
        return {"nargs": "+", "metavar": name.upper()}
    if choices is not None:
        return {"choices": choices}
    for kind, expected in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            return {"type": _parser(kind, expected, lambda value: True), "metavar": "N"}
    return {"metavar": name.upper()}


def add_settings(
    command: argparse.ArgumentParser,
    names: Iterable[str] = tuple(FIELDS),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add ``--config`` and a flag for each of ``names``.

    A flag that is not passed sets no attribute.

    Args:
        defaults: default values shown in the help of a command without recipes and ``--config``.
    """
    if defaults is None:
        command.add_argument(
            "--config", metavar="FILE", help="YAML file of settings; flags win over it"
        )
    for name in names:
        value = {**{name: FIELDS[name].default}, **(defaults or {})}[name]
        text = FIELDS[name].metadata["help"]
        if isinstance(value, str | int | float) and value != "":
            shown = str(value).lower() if isinstance(value, bool) else value
            text += (
                f" (default: {shown}{'' if defaults else ', where the recipe says nothing else'})"
            )
        flag, text = "--" + name.replace("_", "-"), text.replace("%", "%%")
        command.add_argument(
            flag, dest=name, default=argparse.SUPPRESS, help=text, **_options(name)
        )


def passed(parsed: argparse.Namespace, names: Iterable[str] = tuple(FIELDS)) -> dict[str, Any]:
    """Return the settings passed as flags."""
    return {name: value for name, value in vars(parsed).items() if name in names}


def settings(parsed: argparse.Namespace) -> RunConfig:
    """Build the settings from the recipe, the file and the flags."""
    if parsed.config is None and "model" not in parsed:
        expected = "a model's folder or hub name, or --config FILE"
        raise UserError(f"--model: got none, expected {expected}")
    return build({} if parsed.config is None else read_yaml(parsed.config), passed(parsed))
