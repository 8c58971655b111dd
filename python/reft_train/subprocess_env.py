"""Environment for subprocesses, which are used to measure peak memory separately."""

from __future__ import annotations

import os
from pathlib import Path

import reft_kernels
import reft_train


def environment() -> dict[str, str]:
    """Return the environment for a new interpreter that imports the same two packages."""
    packages = (Path(package.__file__).resolve() for package in (reft_train, reft_kernels))
    paths = [*(str(path.parents[1]) for path in packages), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
