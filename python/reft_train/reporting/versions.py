"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")
MISSING = "not installed"


def installed(package: str) -> str:
    """A package's version, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def versions() -> dict[str, str]:
    """Python, platform, :data:`PACKAGES` and reft_kernels."""
    from reft_kernels.version import __version__

    own = {"python": platform.python_version(), "platform": platform.platform()}
    return {**own, **{name: installed(name) for name in PACKAGES}, "reft_kernels": __version__}
