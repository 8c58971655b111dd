"""Installed packages, devices, operator backends and free memory."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_train.procfs import MEMINFO, sizes
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
    "rich": "tables",
    "scikit-learn": "scores of GLUE tasks",
    "optuna": "search",
    "bitsandbytes": "--quantization 8bit and 4bit",
    "liger-kernel": "--liger",
    "deepspeed": "--deepspeed",
    "tensorboard": "TensorBoard logs",
}
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
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
            name: {"serving": env.serving(name), "off": env.unable(name)} for name, _ in devices
        },
    }


def environment_lines(report: dict[str, Any]) -> list[str]:
    """Format the environment as text."""
    from reft_kernels import env

    lines = [
        f"reft_kernels {report['reft_kernels']}, Python {report['python']}, {report['platform']}"
    ]
    for name, version in report["packages"].items():
        lines.append(
            f"  {name:<14}{version}"
            + (f", needed for {NEEDED_FOR[name]}" if version == MISSING else "")
        )
    cpu = (
        f"{report['cores']} cores, {report['threads']} threads, instruction set "
        f"{report['instruction_set']}"
    )
    return [*lines, f"  CPU: {cpu}", *env.backend_lines()]


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # cgroup reports "max" for no limit


def _cpu() -> Memory | None:
    fields = sizes(MEMINFO)
    if not {"MemAvailable", "MemTotal"} <= fields.keys():
        return None
    memory = Memory(fields["MemAvailable"], fields["MemTotal"], "/proc/meminfo")
    for paths in _GROUPS:
        limit, used = map(_number, paths)
        if limit is not None and used is not None and limit < memory.total:
            return Memory(
                min(memory.free, max(0, limit - used)), limit, "the control group's limit"
            )
    return memory


def memory_of(device: str, spread: bool = False) -> Memory | None:
    """Return the memory of ``cpu`` or ``cuda`` (``spread``: of all GPUs), or None if unknown."""
    if device != "cuda":
        return _cpu()
    import torch

    numbers = range(torch.cuda.device_count()) if spread else [torch.cuda.current_device()]
    free, total = map(sum, zip(*map(torch.cuda.mem_get_info, numbers), strict=True))
    return Memory(free, total, f"CUDA, {len(numbers)} device(s)")
