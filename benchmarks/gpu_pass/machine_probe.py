"""What a machine offers to a pass: a GPU, tools and packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROBE_SECONDS = 60
NSIGHT = Path("/opt/nvidia/nsight-compute")  # where its installer puts it, by version
_GPU = """
import torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}")
"""


def tool(name: str) -> str | None:
    """Return the path of a tool on the PATH, in the CUDA toolkit or in Nsight Compute's folder."""
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    folders = [Path(home) / "bin", *sorted(NSIGHT.glob("*"), reverse=True)]
    found = (shutil.which(str(folder / name)) for folder in folders)
    return shutil.which(name) or next((path for path in found if path), None)


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        arch: Compute capability such as ``90``, or an empty string without a GPU.
        tools: Paths of the tools that exist.
    """

    arch: str
    tools: dict[str, str]

    def lacks(self, need: str) -> str:
        """Return why a need is not met, or an empty string."""
        if need == "gpu":
            return "" if self.arch else "no GPU"
        if need in TOOLS:
            return "" if need in self.tools else f"no {TOOLS[need]}"
        if need == "interpreter":
            return interpreter_fails()
        if need == "ninja":
            beside = Path(sys.executable).with_name("ninja")
            found = beside.exists() or shutil.which("ninja")
            return "" if found else "no ninja"
        return "" if importlib.util.find_spec(need) else f"the package {need} is not installed"


TOOLS = {"nvcc": "nvcc", "ncu": "ncu", "sanitizer": "compute-sanitizer"}


_INTERPRETED = """
import torch
from reft_kernels import dispatch, functional
with dispatch.backend("triton"):
    functional.loreft(torch.ones(2, 4), torch.eye(1, 4), torch.ones(1, 4), torch.zeros(1))
"""


def interpreter_fails() -> str:
    """Return why Triton's interpreter does not work, or an empty string.

    That of Triton 3.6 does not work with numpy 2.4 and later, for example.
    """
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"Triton's interpreter: {last}" if done.returncode else ""


def probe() -> Machine:
    """Look for a GPU in another process, so that this one keeps no memory of the GPU.

    Raises:
        RuntimeError: If PyTorch cannot be imported.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", _GPU],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"PyTorch did not find the GPU within {PROBE_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{sys.executable} cannot use torch: {last}")
    found = {need: path for need, name in TOOLS.items() if (path := tool(name))}
    return Machine(done.stdout.strip(), found)
