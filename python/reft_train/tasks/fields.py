"""Validated access to a row's fields; errors name the row and the field."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from reft_train.errors import UserError
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
        raise missing(row, name, known)
    value = row.fields[name]
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {name}: got {described(value)}, expected a string")
    return value


def filled(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> str:
    """Return the text of a required field, which must not be blank."""
    value = string(row, name, known)
    if not value.strip():
        raise UserError(f"{row.where}: {name}: got no text, expected some")
    return value


def optional(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> str:
    """Return the text of an optional field, or "" if it is absent, null or blank."""
    if name not in row.fields and _misspelt(row, name, known, MISSPELT):
        raise missing(row, name, known)
    value = string(row, name, known) if row.fields.get(name) is not None else ""
    return value if value.strip() else ""


def answer(row: Row, name: str = "answer", known: Sequence[str] = ADAPTERS) -> str:
    """Return an answer (a string, a number, or a list of one of these) as stripped text."""
    if name not in row.fields:
        raise missing(row, name, known)
    value = original = row.fields[name]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        expected = "a string, a number or a list of one of these"
        raise UserError(f"{row.where}: {name}: got {described(original)}, expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{row.where}: {name}: got {value}, expected a finite number")
    text = str(value).strip()
    if not text:
        raise UserError(f"{row.where}: {name}: got no text, expected an answer")
    return text


def missing(row: Row, name: str, known: Sequence[str] = ADAPTERS) -> UserError:
    """Build the error for a missing field, suggesting a field with a similar name."""
    close = _misspelt(row, name, known, 0.6)
    meant = f" (did you mean {name!r} by {close!r}?)" if close else ""
    return UserError(
        f"{row.where}: got fields {', '.join(map(str, row.fields)) or 'none'}, expected "
        f"{name}{meant}"
    )


def described(value: Any) -> str:
    """Format a value, shortened and with its type, for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _misspelt(row: Row, name: str, known: Sequence[str], likeness: float) -> str | None:
    others = {str(other).strip().casefold(): other for other in row.fields if other not in known}
    close = difflib.get_close_matches(name.casefold(), others, n=1, cutoff=likeness)
    return others[close[0]] if close else None
