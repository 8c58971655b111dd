"""Environment report: ``python -m reft_kernels.env``.

Prints installed versions, devices, the backend selected for each operator and dtype, and why the
other backends are not available.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from reft_kernels import cpu, dispatch, host_calls, host_memory
from reft_kernels.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def installed(package: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[tuple[str, str]]:
    """Return the available device types, each with a description."""
    result = [
        ("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    ]
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        result.append(("cuda", f"{torch.cuda.device_count()} x {', '.join(names)}"))
    return result


def serving(device: str) -> dict[str, dict[str, str]]:
    """Return the backend selected on a device type: ``{operator: {dtype: backend}}``.

    Where no backend is available, its name is "none".
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
    """Return the backends that are unavailable on a device type, each with the reason."""
    reasons = {
        name: dispatch.unsupported_reason(name, "edit", device, torch.float32)
        for name in dispatch.BACKENDS
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def report() -> str:
    """Return the report as text: versions, devices and the backend of each operator."""
    lines = [
        f"reft_kernels {__version__}, Python {platform.python_version()} on {platform.system()} "
        f"{platform.machine()}"
    ]
    lines += [f"  {name:<14}{installed(name)}" for name in _PACKAGES]
    return "\n".join([*lines, *backend_lines()])


def backend_lines() -> list[str]:
    """Return the lines of :func:`report` that follow the versions."""
    forced = dispatch.forced_backend()
    lines = [f"  {dispatch.ENVIRONMENT_VARIABLE}: {forced or 'not set (automatic)'}"]
    lines.append(f"  TRITON_INTERPRET: {'on' if dispatch.interpreting() else 'off'}")
    lines.append(f"  host library: {host_calls.unavailable_reason() or 'used'}")
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
    """Return the first error of an operator that has no backend; an empty list if there is none."""
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
