"""Errors caused by user input, printed as one line without a traceback.

Any function of the program may raise them; docstrings mention them only where useful.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the argument, the value received and the value expected."""


class ReportedError(UserError):
    """Bad input reported by another process. Raised on non-main ranks; exits without printing."""
