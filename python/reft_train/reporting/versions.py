"""Versions of the software that results depend on."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")
MISSING = "not installed"


def installed(package: str) -> str:
    """Return a package's version, or ``not installed``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform, :data:`PACKAGES` and reft_kernels."""
    from reft_kernels.version import __version__

    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, **{name: installed(name) for name in PACKAGES}, "reft_kernels": __version__}
