"""``python -m reft_kernels.env``: what is installed, and which backend serves which operator, and why not another."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from reft_kernels import cpu, dispatch
from reft_kernels.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        found.append(("cuda", f"{torch.cuda.device_count()} x {', '.join(names)}"))
    return found


def report() -> str:
    """The environment as text: versions, devices, and for each device the serving backend of every operator."""
    lines = [f"reft_kernels {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"  {name:<14}{_installed(name)}" for name in _PACKAGES]
    forced = dispatch.forced_backend()
    lines.append(f"  {dispatch.ENVIRONMENT_VARIABLE}: {forced or 'not set (automatic)'}")
    lines.append(f"  TRITON_INTERPRET: {'on' if dispatch.interpreting() else 'off'}")
    for device, description in _devices():
        lines.append(f"\n{device} ({description})")
        served: dict[str, list[str]] = {}
        reasons: dict[str, str] = {}
        for operator in dispatch.OPERATORS:
            cells = []
            for dtype in _DTYPES:
                try:
                    name, _ = dispatch.choose(operator, device, dtype)
                except dispatch.BackendError as error:
                    name = "none"
                    reasons.setdefault("none", str(error))
                cells.append(f"{str(dtype).removeprefix('torch.')}={name}")
            served.setdefault("  ".join(cells), []).append(operator)
        for cells, operators in served.items():
            lines.append(f"  {cells}")
            lines.append(f"      {', '.join(operators)}")
        for name in dispatch.BACKENDS:
            reason = dispatch.why_unable(name, "edit", device, torch.float32)
            detail = f", instruction set {cpu.instruction_set()}" if name == "cpu" else ""
            lines.append(f"  {name:<8}{f'able{detail}' if reason is None else f'off: {reason}'}")
        lines += [f"  {reason}" for reason in reasons.values()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
    sys.exit(0)
