"""Figures without a display, and the versions in use."""

from __future__ import annotations

import io
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from reft_kernels.env import installed
from reft_kernels.version import __version__
from reft_train.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "datasets", "numpy")


def new_figure(*size: float) -> Figure:
    """Create an empty figure of ``size`` inches without pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=size or (8, 4.5), layout="constrained")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, with the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return write_bytes(path, buffer.getvalue())


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform, :data:`PACKAGES` and reft_kernels."""
    system = {"python": platform.python_version(), "platform": platform.platform()}
    return {**system, **{name: installed(name) for name in PACKAGES}, "reft_kernels": __version__}
