"""What is installed, which devices there are, and which backend of reft_kernels serves which
operator.
"""

from __future__ import annotations

import os
import platform
from typing import Any

from reft_train.reporting.versions import MISSING, installed

NEEDED_FOR = {
    "torch": "everything",
    "triton": "the Triton kernels on GPUs",
    "transformers": "every command",
    "peft": "every command",
    "accelerate": "training",
    "datasets": "Parquet files and training data",
    "safetensors": "weights and adapters",
    "matplotlib": "loss.png and report.html",
    "scikit-learn": "scores of GLUE tasks",
    "optuna": "search",
    "bitsandbytes": "--quantization 8bit and 4bit",
    "liger-kernel": "--liger",
    "deepspeed": "--deepspeed",
    "tensorboard": "TensorBoard logs",
}


def environment() -> dict[str, Any]:
    """Plain values: ``python``, ``platform``, ``packages``, ``devices``, ``threads``,
    ``instruction_set`` and ``backends``.

    ``backends`` has for each kind of device the backend that serves each operator and dtype, and
    why others are off.
    """
    import torch

    from reft_kernels import cpu, env
    from reft_kernels.version import __version__

    devices = env.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "reft_kernels": __version__,
        "packages": {name: installed(name) for name in NEEDED_FOR},
        "devices": dict(devices),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "backends": {
            device: {"serving": env.serving(device), "off": env.unable(device)}
            for device, _ in devices
        },
    }


def environment_lines(found: dict[str, Any]) -> list[str]:
    """The environment as text."""
    from reft_kernels import env

    lines = [f"reft_kernels {found['reft_kernels']}, Python {found['python']}, {found['platform']}"]
    for name, version in found["packages"].items():
        lines.append(
            f"  {name:<14}"
            + (f"{version}, needed for {NEEDED_FOR[name]}" if version == MISSING else version)
        )
    lines.append(
        f"  CPU: {found['cores']} cores, {found['threads']} threads, instruction set "
        f"{found['instruction_set']}"
    )
    return lines + env.backend_lines()
