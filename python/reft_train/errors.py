"""Errors caused by user input, printed as one line without a traceback.

Any function of the program may raise them; docstrings mention them only where useful.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the argument, the value received and the value expected."""


class ReportedError(UserError):
    """Bad input reported by another process. Raised on non-main ranks; exits without printing."""


def wrong(name: str, got: object, expected: object) -> UserError:
    """Build the error for an argument with a wrong value."""
    return UserError(f"{name}: got {got}, expected {expected}")


def one_line(error: object, limit: int = 300) -> str:
    """Format an error's message on one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit]
