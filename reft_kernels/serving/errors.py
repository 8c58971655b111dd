"""Errors of served adapters and of requests for them."""

from __future__ import annotations


class AdapterError(ValueError):
    """Raised if an adapter cannot be served, or a request for one is malformed."""


class UnknownAdapter(AdapterError):
    """Raised if no adapter of that name is loaded.

    Args:
        name: The name.
        known: The names that are loaded.
    """

    def __init__(self, name: str, known: list[str]) -> None:
        listed = ", ".join(map(repr, sorted(known)[:20])) or "none"
        super().__init__(f"adapter: got {name!r}, expected one of those loaded: {listed}")
