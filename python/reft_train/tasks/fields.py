"""Validated access to a row's fields; errors name the row and the field."""

from __future__ import annotations

import difflib
import math
from typing import Any

from reft_train.errors import wrong
from reft_train.tasks.base import Row

# similarity above which another field is treated as a misspelt optional one
MISSPELT = 0.8


def string(row: Row, name: str) -> str:
    """Return the text of a required field, which may be empty."""
    value = _value(row, name)
    if not isinstance(value, str):
        raise wrong(f"{row.where}: {name}", described(value), "a string")
    return value


def filled(row: Row, name: str) -> str:
    """Return the text of a required field, which must not be blank."""
    value = string(row, name)
    if not value.strip():
        raise wrong(f"{row.where}: {name}", "no text", "some")
    return value


def optional(row: Row, name: str) -> str:
    """Return the text of an optional field, or "" if it is absent, null or blank."""
    others = [str(other).strip().casefold() for other in row.fields]
    if name not in row.fields and difflib.get_close_matches(name, others, cutoff=MISSPELT):
        return _value(row, name)  # an error: the misspelt field would be left out
    value = string(row, name) if row.fields.get(name) is not None else ""
    return value if value.strip() else ""


def answer(row: Row, name: str = "answer") -> str:
    """Return an answer (a string, a number, or a list of one of these) as stripped text."""
    given = value = _value(row, name)
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value.strip()):
        expected = "text, a finite number or a list of one of these"
        raise wrong(f"{row.where}: {name}", described(given), expected)
    return str(value).strip()


def described(value: Any) -> str:
    """Format a value, shortened and with its type, for an error message."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _value(row: Row, name: str) -> Any:
    if name not in row.fields:
        raise wrong(row.where, f"fields {', '.join(map(str, row.fields)) or 'none'}", name)
    return row.fields[name]
