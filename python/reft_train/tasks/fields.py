"""Validated access to a row's fields; errors name the row and the field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from reft_train.errors import UserError, wrong
from reft_train.tasks.base import Row

ADAPTERS = ("instruction", "input", "output", "answer")  # fields of an LLM-Adapters file
# similarity above which an unknown field is treated as a misspelt known field
MISSPELT = 0.8


def string(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> str:
    """Return the text of a required field, which may be empty.

    Args:
        known: fields that a row can have; any other may be misspelt.
    """
    if name not in row.fields:
        raise _missing(row, name, known)
    value = row.fields[name]
    if not isinstance(value, str):
        raise wrong(f"{row.where}: {name}", described(value), "a string")
    return value


def filled(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> str:
    """Return the text of a required field, which must not be blank."""
    value = string(row, name, known)
    if not value.strip():
        raise wrong(f"{row.where}: {name}", "no text", "some")
    return value


def optional(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> str:
    """Return the text of an optional field, or "" if it is absent, null or blank."""
    if name not in row.fields and _misspelt(row, name, known, MISSPELT):
        raise _missing(row, name, known)
    value = string(row, name, known) if row.fields.get(name) is not None else ""
    return value if value.strip() else ""


def answer(row: Row, name: str = "answer", known: Sequence[str] = ADAPTERS) -> str:
    """Return an answer (a string, a number, or a list of one of these) as stripped text."""
    if name not in row.fields:
        raise _missing(row, name, known)
    value = row.fields[name]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value.strip()):
        expected = "text, a finite number or a list of one of these"
        raise wrong(f"{row.where}: {name}", described(row.fields[name]), expected)
    return str(value).strip()


def described(value: Any) -> str:
    """Format a value, shortened and with its type, for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _missing(row: Row, name: str, known: Sequence[str]) -> UserError:
    close = _misspelt(row, name, known, 0.6)
    meant = f"{name} (did you mean {name!r} by {close!r}?)" if close else name
    return wrong(row.where, f"fields {', '.join(map(str, row.fields)) or 'none'}", meant)


def _misspelt(row: Row, name: str, known: Sequence[str], likeness: float) -> str | None:
    others = {str(other).strip().casefold(): other for other in row.fields if other not in known}
    close = difflib.get_close_matches(name.casefold(), others, n=1, cutoff=likeness)
    return others[close[0]] if close else None
