"""Command line flags made from the fields of pydantic models, which validate their values."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from reft_train.config import FIELDS, RunConfig, Settings, build, read_yaml, validated
from reft_train.errors import wrong

Options = TypeVar("Options", bound=Settings)


def add_flags(command: Any, fields: Mapping[str, FieldInfo], note: str = "") -> None:
    """Add a flag for each field. A flag that is not passed sets no attribute.

    Args:
        command: a parser or a group of flags.
        note: follows the default values in the help.
    """
    for name, field in fields.items():
        options: dict[str, Any] = {"metavar": name.upper(), "required": field.is_required()}
        if field.annotation is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(field.annotation) is typing.Literal:
            options = {"choices": typing.get_args(field.annotation)}
        elif typing.get_origin(field.annotation) is list:
            options["nargs"] = "+"
        text, default = (field.description or "").replace("%", "%%"), field.get_default()
        if default not in (None, "", [], PydanticUndefined):
            shown = str(default).lower() if isinstance(default, bool) else default
            text += f" (default: {shown}{note})"
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, dest=name, default=argparse.SUPPRESS, help=text, **options)


def add_settings(command: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Add ``--config``, and a flag for each of ``names``, fields of :class:`RunConfig`."""
    text = "YAML file of settings; flags take precedence"
    command.add_argument("--config", metavar="FILE", help=text)
    add_flags(command, {name: FIELDS[name] for name in names}, ", or the recipe")


def passed(parsed: argparse.Namespace, names: Iterable[str] = tuple(FIELDS)) -> dict[str, Any]:
    return {name: value for name, value in vars(parsed).items() if name in names}


def options(parsed: argparse.Namespace, kind: type[Options]) -> Options:
    """Build a command's own options from its flags."""
    return validated(kind, passed(parsed, kind.model_fields))


def settings(parsed: argparse.Namespace) -> RunConfig:
    """Build the settings from the recipe, the file and the flags."""
    if parsed.config is None and "model" not in parsed:
        raise wrong("--model", "none", "a model's folder or hub name, or --config FILE")
    return build({} if parsed.config is None else read_yaml(parsed.config), passed(parsed))
