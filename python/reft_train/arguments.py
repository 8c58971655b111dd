"""Argument types for the command line: each says what came and what was expected."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable


def count(low: int, high: int | None = None) -> Callable[[str], int]:
    """An integer from ``low`` to ``high``."""
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
        return value

    return parse


def rate(text: str) -> float:
    """A positive, finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number > 0")
    return value


def positions(text: str) -> str:
    """A position spec, in its canonical spelling."""
    from reft_kernels.positions import parse

    try:
        spec = parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected 'fN', 'lN' or 'fN+lM' (N, M >= 1) or 'all'"
        ) from None
    if spec.kind != "ends":
        return "all"  # an encoder's prompt is the whole sequence
    return "+".join(
        f"{end}{number}" for end, number in (("f", spec.first), ("l", spec.last)) if number
    )


def layers(text: str) -> str | list[int]:
    """``all``, or layer numbers separated by ``;`` or ``,``."""
    if text.strip() == "all":
        return "all"
    parts = [part.strip() for part in re.split("[;,]", text)]
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected 'all' or layer numbers such as 0;2;4"
        )
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected each layer once")
    return sorted(numbers)
