"""Processes that this program starts anew, so that the peak memory of what they do is their own."""

from __future__ import annotations

import os
from pathlib import Path

import reft_kernels
import reft_train


def environment() -> dict[str, str]:
    """This process's environment for a new interpreter, which finds the two packages where this
    one found them.
    """
    paths = [
        str(Path(package.__file__).resolve().parents[1]) for package in (reft_train, reft_kernels)
    ]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
