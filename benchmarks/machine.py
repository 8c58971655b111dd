"""Where a measurement was taken: device, versions, commit, how memory is had."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

CACHE_BYTES = 64 << 20  # of a CPU whose last-level cache cannot be asked


def _words(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def device_name(device: str) -> str:
    """A folder-safe name: the GPU's, or the CPU's with its thread count."""
    if device == "cuda":
        return _words(torch.cuda.get_device_name())
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1]
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{_words(model)}-{torch.get_num_threads()}-threads"


@functools.cache
def commit() -> str:
    """The repository's commit, with a plus where tracked files differ; "unknown" outside a
    checkout.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=False
        )

    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return "unknown"
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return (
        "unknown"
        if head.returncode
        else head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    )


@functools.cache
def driver(device: str) -> str:
    """The GPU driver's version."""
    if device != "cuda":
        return ""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(asked, capture_output=True, text=True, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return f"HIP {torch.version.hip}" if torch.version.hip else "unknown"


def version(package: str) -> str:
    """An installed package's version, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def allocator(device: str) -> str:
    """How tensors get memory: PyTorch asks Linux for huge pages where
    ``THP_MEM_ALLOC_ENABLE=1``.
    """
    if device == "cuda":
        return "cuda"
    return "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "malloc"


def cache_bytes(device: str) -> int:
    """The last-level cache that input sets must overflow to be cold."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1] in "KM"),
        default=CACHE_BYTES,
    )
