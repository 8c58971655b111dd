"""The flags of the commands that take a run's settings: one for each field of
:class:`reft_train.config.RunConfig`.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Iterable
from typing import Any

from reft_train import arguments
from reft_train.config import FIELDS, TYPES, RunConfig, build, read_yaml
from reft_train.errors import UserError


def _number(kind: type) -> Any:
    def parse(text: str) -> int | float:
        try:
            return kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}") from None

    return parse


def _options(name: str) -> dict[str, Any]:
    hint = TYPES[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    choices = FIELDS[name].metadata.get("choices")
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if name == "layers":
        return {"type": arguments.layers, "metavar": "LIST"}
    if any(typing.get_origin(kind) is list for kind in kinds):
        return {"nargs": "+", "metavar": name.upper()}
    if choices is not None:
        return {"choices": choices}
    kind = next(kind for kind in kinds if kind is not type(None))
    return (
        {"type": _number(kind), "metavar": "N"}
        if kind in (int, float)
        else {"metavar": name.upper()}
    )


def _default(name: str) -> str:
    value = FIELDS[name].default
    if not isinstance(value, str | int | float) or value == "":
        return ""
    return (
        f" (default: {str(value).lower() if isinstance(value, bool) else value}, where the recipe "
        "says nothing else)"
    )


def add_settings(command: argparse.ArgumentParser, names: Iterable[str] | None = None) -> None:
    """Add ``--config`` and a flag for each setting (for each of ``names``); one that is not
    given leaves no trace.
    """
    command.add_argument(
        "--config", metavar="FILE", help="YAML file of settings; flags win over it"
    )
    for name in FIELDS if names is None else names:
        text = FIELDS[name].metadata["help"] + _default(name)
        command.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **_options(name),
        )


def given(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags state."""
    return {name: value for name, value in vars(parsed).items() if name in FIELDS}


def settings(parsed: argparse.Namespace) -> RunConfig:
    """Settings from recipe, file and flags.

    Raises:
        UserError: as :func:`reft_train.config.build`.
    """
    if parsed.config is None and "model" not in parsed:
        raise UserError(
            "--model: got none, expected a model's folder or hub name, or --config FILE"
        )
    return build({} if parsed.config is None else read_yaml(parsed.config), given(parsed))
