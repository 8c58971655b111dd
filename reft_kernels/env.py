"""``python -m reft_kernels.env``: what is installed, and which backend serves which operator,
and why not another.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from reft_kernels import cpu, dispatch, host_memory
from reft_kernels.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def installed(package: str) -> str:
    """A package's version, or ``not installed``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """The kinds of device that there are, each with a description."""
    found = [
        ("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    ]
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        found.append(("cuda", f"{torch.cuda.device_count()} x {', '.join(names)}"))
    return found


def serving(device: str) -> dict[str, dict[str, str]]:
    """For each operator the backend that serves it on a kind of device, by dtype; ``none`` where
    there is none.
    """

    def name(operator: str, dtype: torch.dtype) -> str:
        try:
            return dispatch.choose(operator, device, dtype)[0]
        except dispatch.BackendError:
            return "none"

    return {
        operator: {str(dtype).removeprefix("torch."): name(operator, dtype) for dtype in _DTYPES}
        for operator in dispatch.OPERATORS
    }


def unable(device: str) -> dict[str, str]:
    """The backends that are off on a kind of device, each with the reason."""
    reasons = {
        name: dispatch.unsupported_reason(name, "edit", device, torch.float32)
        for name in dispatch.BACKENDS
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def report() -> str:
    """The environment as text: versions, devices, and for each device the serving backend of
    every operator.
    """
    lines = [
        f"reft_kernels {__version__}, Python {platform.python_version()} on {platform.system()} "
        f"{platform.machine()}"
    ]
    lines += [f"  {name:<14}{installed(name)}" for name in _PACKAGES]
    return "\n".join([*lines, *backend_lines()])


def backend_lines() -> list[str]:
    """The part of :func:`report` after the versions."""
    forced = dispatch.forced_backend()
    lines = [f"  {dispatch.ENVIRONMENT_VARIABLE}: {forced or 'not set (automatic)'}"]
    lines.append(f"  TRITON_INTERPRET: {'on' if dispatch.interpreting() else 'off'}")
    for device, description in devices():
        lines.append(f"\n{device} ({description})")
        served: dict[str, list[str]] = {}
        for operator, backends in serving(device).items():
            served.setdefault(
                "  ".join(f"{dtype}={name}" for dtype, name in backends.items()), []
            ).append(operator)
        for cells, operators in served.items():
            lines.append(f"  {cells}")
            lines.append(f"      {', '.join(operators)}")
        reasons = unable(device)
        for name in dispatch.BACKENDS:
            detail = ""
            if name == "cpu":
                detail = (
                    f", instruction set {cpu.instruction_set()}, up to {host_memory.limit()} MiB "
                    "of freed outputs kept"
                )
            lines.append(
                f"  {name:<8}{f'off: {reasons[name]}' if name in reasons else f'able{detail}'}"
            )
        lines += [f"  {reason}" for reason in _failures(device)]
    return lines


def _failures(device: str) -> list[str]:
    """Why an operator has no backend at all: the first such error."""
    for operator in dispatch.OPERATORS:
        for dtype in _DTYPES:
            try:
                dispatch.choose(operator, device, dtype)
            except dispatch.BackendError as error:
                return [str(error)]
    return []


if __name__ == "__main__":
    print(report())
    sys.exit(0)
