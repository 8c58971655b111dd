"""Command line flags for a run's settings, one for each field of ``RunConfig``."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reft_train.config import FIELDS, RunConfig, build, read_yaml
from reft_train.errors import wrong


def number(kind: Callable[[str], Any], low: float, high: float = float("inf")) -> Callable:
    """Return an argparse type for numbers from ``low`` to ``high``."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            expected = f"{kind.__name__} >= {low:g}" + (f" and <= {high:g}" if high < 1e300 else "")
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


SEED = number(int, 0, 2**31 - 1)


def _options(name: str) -> dict[str, Any]:
    kind = FIELDS[name].annotation
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    return {"metavar": name.upper()} | ({"nargs": "+"} if kind == list[str] else {})


def add_settings(
    command: argparse.ArgumentParser,
    names: Iterable[str] = tuple(FIELDS),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Add ``--config`` and a flag for each of ``names``.

    A flag that is not passed sets no attribute. Values are validated with the other settings.

    Args:
        defaults: default values shown in the help of a command without recipes and ``--config``.
    """
    if defaults is None:
        text = "YAML file of settings; flags take precedence"
        command.add_argument("--config", metavar="FILE", help=text)
    for name in names:
        value = {**{name: FIELDS[name].default}, **(defaults or {})}[name]
        text = FIELDS[name].description or ""
        if value not in (None, "", []):
            shown = str(value).lower() if isinstance(value, bool) else value
            text += f" (default: {shown}{'' if defaults else ', or the recipe'})"
        flag = "--" + name.replace("_", "-")
        text = text.replace("%", "%%")
        command.add_argument(
            flag, dest=name, default=argparse.SUPPRESS, help=text, **_options(name)
        )


def passed(parsed: argparse.Namespace, names: Iterable[str] = tuple(FIELDS)) -> dict[str, Any]:
    return {name: value for name, value in vars(parsed).items() if name in names}


def settings(parsed: argparse.Namespace) -> RunConfig:
    """Build the settings from the recipe, the file and the flags."""
    if parsed.config is None and "model" not in parsed:
        raise wrong("--model", "none", "a model's folder or hub name, or --config FILE")
    return build({} if parsed.config is None else read_yaml(parsed.config), passed(parsed))
