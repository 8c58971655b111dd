"""Names that changed: the old ones work for one release and warn."""

from __future__ import annotations

import warnings
from typing import TypeVar

T = TypeVar("T")


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn (DeprecationWarning) that ``old`` is now called ``new``."""
    warnings.warn(
        f"{old} is now called {new}; the old name will go in the next release",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def renamed_argument(old: str, given: T | None, new: str, value: T | None) -> T | None:
    """The value of argument ``new``, for a caller that may have used its former name ``old``.

    Raises:
        TypeError: both names were given.
    """
    if given is None:
        return value
    if value is not None:
        raise TypeError(f"{old}: got both {old} and {new}, expected {new} alone")
    warn_renamed(f"argument {old}", new, stacklevel=3)
    return given
