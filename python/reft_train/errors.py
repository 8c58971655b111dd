"""The error that a user can mend: printed as one line, without a traceback.

Any function of the program may raise it for bad input; docstrings name it where more is to be said.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input. The message names the argument, what came and what was expected."""


class ReportedError(UserError):
    """Bad input that another process of the run prints: this one ends in silence."""
