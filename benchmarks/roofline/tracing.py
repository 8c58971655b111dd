"""Execution of sample programs of a recorded launch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from benchmarks.roofline.compiling import Compiled
from benchmarks.roofline.execution import Machine
from benchmarks.roofline.launches import Launch, source
from benchmarks.roofline.traces import Buffer, Trace

_INTEGER = (torch.int8, torch.int32, torch.int64)


def buffer(name: str, tensor: torch.Tensor) -> Buffer:
    """Return the memory of a tensor; with its content if it has integers."""
    extent = 1 + sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size = extent * tensor.element_size() if tensor.numel() else 0
    content = None
    if tensor.dtype in _INTEGER and tensor.is_contiguous():
        content = tensor.flatten().view(torch.uint8).numpy()
    return Buffer(name, tensor.data_ptr(), size, content)


def _pack(value: Any, size: int) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, float):
        return np.array([value], np.float32 if size == 4 else np.float64).tobytes()
    return int(value).to_bytes(size, "little", signed=value < 0)


def machine(launch: Launch, compiled: Compiled, arrived: int = 0) -> Machine:
    """Prepare the execution of programs of a launch.

    Args:
        launch: The launch.
        compiled: Its kernel, for NVIDIA.
        arrived: Value that atomic operations on global memory return.

    Raises:
        ValueError: If the kernel was compiled for AMD.
    """
    kernel = compiled.kernel
    if kernel is None:
        raise ValueError(f"compiled: got {compiled.target.name}, expected an NVIDIA target")
    signature = source(launch, compiled.target)[0].signature
    passed = [launch.arguments[name] for name, kind in signature.items() if kind != "constexpr"]
    arguments = b""
    for k, parameter in enumerate(kernel.parameters):
        size = parameter.size
        arguments += b"\0" * (-len(arguments) % size)
        # Triton appends pointers to scratch memory, which these kernels do not use
        arguments += _pack(passed[k] if k < len(passed) else 0, size)
    buffers = [
        buffer(name, value)
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor)
    ]
    return Machine(kernel, arguments, buffers, compiled.threads, launch.grid, arrived)


def samples(launch: Launch, most: int = 3) -> list[tuple[int, int, int]]:
    """Return the first, a middle and the last program of a launch."""
    count = launch.programs
    numbers = sorted({0, count // 2, count - 1})[:most]
    axes = [range(n) for n in launch.grid[::-1]]
    return [
        program[::-1]
        for number, program in enumerate(itertools.product(*axes))
        if number in numbers
    ]


def traces(launch: Launch, compiled: Compiled) -> list[Trace]:
    """Execute the sample programs of a launch; no program is the last to finish."""
    runner = machine(launch, compiled)
    return [runner.run(program) for program in samples(launch)]


def last_arrival(launch: Launch, compiled: Compiled) -> Trace | None:
    """Execute the last program as the last of those that share a sum.

    They are counted along the second axis of the grid.

    Returns:
        None if programs do not count each other.
    """
    kernel = compiled.kernel
    if kernel is None or not any(
        i.opcode.startswith("atom.") and "shared" not in i.opcode for i in kernel.code.instructions
    ):
        return None
    last = tuple(n - 1 for n in launch.grid)
    return machine(launch, compiled, launch.grid[1] - 1).run((last[0], last[1], last[2]))
