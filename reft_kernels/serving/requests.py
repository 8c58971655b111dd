"""What a request says about its adapter."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from reft_kernels.checks import describe
from reft_kernels.serving.errors import AdapterError

KEY = "reft"
"""Key of the value in a request's extra arguments."""

_FIELDS = ("adapter", "coefficient", "subspaces", "prompt_length")


class AdapterRequest(NamedTuple):
    """A parsed request.

    Attributes:
        adapter: Name of the adapter.
        coefficient: Multiplies the update of every edit.
        subspaces: Rows of R (columns of R^T) whose part of the update is kept; None keeps all.
        prompt_length: Number of first tokens on which positions count; None: the whole prompt.
    """

    adapter: str
    coefficient: float = 1.0
    subspaces: tuple[int, ...] | None = None
    prompt_length: int | None = None


def _is_count(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def parse_request(value: Any) -> AdapterRequest:
    """Parse the value of :data:`KEY` in a request.

    Args:
        value: The name of an adapter; or a dictionary with the fields of :class:`AdapterRequest`,
            of which "adapter" is required; or that dictionary as a JSON string.

    Raises:
        AdapterError: If the value is malformed.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise AdapterError(f"{KEY}: got a string that is no JSON object: {error}") from None
    if isinstance(value, str):
        value = {"adapter": value}
    if not isinstance(value, dict):
        raise AdapterError(
            f"{KEY}: got {describe(value)}, expected the name of an adapter or an object with "
            f"{', '.join(_FIELDS)}"
        )
    unknown = sorted(set(map(str, value)) - set(_FIELDS))
    if unknown:
        raise AdapterError(f"{KEY}: got unknown fields {unknown}, expected {', '.join(_FIELDS)}")
    name = value.get("adapter")
    if not isinstance(name, str) or not name:
        raise AdapterError(f"adapter: got {describe(name)}, expected the name of an adapter")
    coefficient = value.get("coefficient", 1.0)
    if (
        isinstance(coefficient, bool)
        or not isinstance(coefficient, int | float)
        or not math.isfinite(coefficient)
    ):
        raise AdapterError(f"coefficient: got {describe(coefficient)}, expected a finite number")
    subspaces = value.get("subspaces")
    if subspaces is not None:
        if (
            not isinstance(subspaces, list | tuple)
            or not subspaces
            or not all(_is_count(n, 0) for n in subspaces)
            or len(set(subspaces)) < len(subspaces)
        ):
            raise AdapterError(
                f"subspaces: got {describe(subspaces)}, expected a list of different column "
                "numbers, at least one"
            )
        subspaces = tuple(sorted(subspaces))
    length = value.get("prompt_length")
    if length is not None and not _is_count(length, 1):
        raise AdapterError(f"prompt_length: got {describe(length)}, expected an integer >= 1")
    return AdapterRequest(name, float(coefficient), subspaces, length)
