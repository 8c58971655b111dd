"""The versions in use."""

from __future__ import annotations

import platform

from reft_kernels.env import installed
from reft_kernels.version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform, :data:`PACKAGES` and reft_kernels."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, **{name: installed(name) for name in PACKAGES}, "reft_kernels": __version__}
