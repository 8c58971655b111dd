"""Installed packages, devices, operator backends and free memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from reft_train.reporting import installed

NEEDED_FOR = {
    "torch": "everything",
    "triton": "the Triton kernels on GPUs",
    "transformers": "every command",
    "peft": "every command",
    "accelerate": "training",
    "datasets": "Parquet files and training data",
    "safetensors": "weights and adapters",
    "pydantic": "settings",
    "matplotlib": "loss.png and report.html",
    "rich": "tables",
    "scikit-learn": "scores of GLUE tasks",
    "optuna": "search",
    "bitsandbytes": "--quantization 8bit and 4bit",
    "liger-kernel": "--liger",
    "deepspeed": "--deepspeed",
    "tensorboard": "TensorBoard logs",
}
_CGROUP = Path("/sys/fs/cgroup")
_GROUPS = (
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Memory:
    """Memory in bytes, and the source of the numbers."""

    free: int
    total: int
    source: str


def environment() -> dict[str, Any]:
    """Collect the environment as plain values.

    ``backends`` gives the backend of each operator by device, and why others are unavailable.
    """
    import torch

    from reft_kernels import cpu, env
    from reft_kernels.version import __version__

    devices = dict(env.devices())
    backends = {name: {"serving": env.serving(name), "off": env.unable(name)} for name in devices}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "reft_kernels": __version__,
        "packages": {name: installed(name) for name in NEEDED_FOR},
        "devices": devices,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set(),
        "backends": backends,
    }


def environment_lines(report: dict[str, Any]) -> list[str]:
    from reft_kernels import env

    python = f"Python {report['python']}, {report['platform']}"
    lines = [f"reft_kernels {report['reft_kernels']}, {python}"]
    for name, version in report["packages"].items():
        purpose = f", needed for {NEEDED_FOR[name]}" if version == "not installed" else ""
        lines.append(f"  {name:<14}{version}{purpose}")
    cpu = f"{report['cores']} cores, {report['threads']} threads"
    lines.append(f"  CPU: {cpu}, instruction set {report['instruction_set']}")
    return [*lines, *env.backend_lines()]


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or "max" for no limit
        return None


def memory_of(device: str, spread: bool = False) -> Memory:
    """Return the memory of ``cpu`` or ``cuda`` (``spread``: of all GPUs)."""
    if device == "cuda":
        import torch

        numbers = range(torch.cuda.device_count()) if spread else [torch.cuda.current_device()]
        free, total = map(sum, zip(*map(torch.cuda.mem_get_info, numbers), strict=True))
        return Memory(free, total, f"CUDA, {len(numbers)} device(s)")
    found = psutil.virtual_memory()
    for paths in _GROUPS:
        limit, used = map(_number, paths)
        if limit is not None and used is not None and limit < found.total:
            free = min(found.available, max(0, limit - used))
            return Memory(free, limit, "the control group's limit")
    return Memory(found.available, found.total, "system memory")
