"""The environment of a measurement: device, versions, commit and allocator."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

COMMIT_VARIABLE = "REFT_KERNELS_COMMIT"
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}
CACHE_BYTES = 64 << 20  # assumed where a CPU's last-level cache size is not available


def _words(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def device_name(device: str) -> str:
    """Return a folder-safe name of the GPU, or of the CPU with its number of threads."""
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
    """Return the short commit hash of the repository.

    A plus sign follows if tracked files differ. Outside a checkout it is the value of the
    environment variable ``REFT_KERNELS_COMMIT``, or else ``sources-`` and a digest of the sources.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=False
        )

    try:
        head = git("rev-parse", "--short", "HEAD")
    except FileNotFoundError:
        return _named_commit()
    if head.returncode:
        return _named_commit()
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _named_commit() -> str:
    return os.environ.get(COMMIT_VARIABLE) or f"sources-{sources_digest()[:12]}"


def sources_digest(folders: tuple[str, ...] = ("benchmarks", "csrc", "reft_kernels")) -> str:
    """Return a digest of the source files in folders of the repository.

    By default they are those of the benchmarks, the kernels and the engine.
    """
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def driver(device: str) -> str:
    """Return the version of the GPU driver, or an empty string for a CPU."""
    if device != "cuda":
        return ""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(command, capture_output=True, text=True, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return f"HIP {torch.version.hip}" if torch.version.hip else "unknown"


def version(package: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def allocator(device: str) -> str:
    """Return how tensors are allocated: ``cuda``, ``huge pages`` or ``malloc``.

    PyTorch requests huge pages from Linux when ``THP_MEM_ALLOC_ENABLE=1``.
    """
    if device == "cuda":
        return "cuda"
    return "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "malloc"


def memory_bytes(device: str) -> int:
    """Return the size of the GPU's memory."""
    return torch.cuda.get_device_properties(0).total_memory


def cache_bytes(device: str) -> int:
    """Return the size of the last-level cache."""
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
