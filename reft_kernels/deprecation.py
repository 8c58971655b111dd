"""Deprecation warnings for renamed functions and arguments.

A former name keeps working for one release and emits a DeprecationWarning.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

T = TypeVar("T")


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Emit a DeprecationWarning that ``old`` is now called ``new``.

    Args:
        old: The former name.
        new: The current name.
        stacklevel: As in ``warnings.warn``, counted from the caller of this function.
    """
    warnings.warn(
        f"{old} is now called {new}; the old name will go in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed_argument(old: str, old_value: T | None, new: str, value: T | None) -> T | None:
    """Return the value of a renamed argument.

    Args:
        old: The former name.
        old_value: The value passed under the former name, or None.
        new: The current name.
        value: The value passed under the current name, or None.

    Raises:
        TypeError: If both values are given.
    """
    if old_value is None:
        return value
    if value is not None:
        raise TypeError(f"{old}: got both {old} and {new}, expected {new} alone")
    warn_renamed(f"argument {old}", new, stacklevel=3)
    return old_value
