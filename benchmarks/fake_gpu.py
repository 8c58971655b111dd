"""A stand-in for Triton's GPU driver: kernels are compiled for a GPU, and launches are recorded.

CPU tensors take the place of GPU tensors. Nothing runs, so outputs are not written.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from reft_kernels import dispatch
from reft_kernels.triton import common

launch = importlib.import_module("reft_kernels.triton.launch")
SM_90 = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """A launch as Triton's C launcher receives it."""

    grid: tuple[int, int, int]
    stream: int
    function: int  # identifies the compiled kernel
    arguments: tuple  # of all parameters, with addresses or tensors for pointers


class FakeDriver:
    """Implements what ``JITFunction.run`` and ``CompiledKernel`` use of a driver."""

    def __init__(self, target: GPUTarget = SM_90):
        self.target = target
        self.launches: list[Launch] = []
        self.loaded: list[str] = []  # names of the compiled kernels
        self.kernels: list[Any] = []
        self.stream = 7
        self.utils = types.SimpleNamespace(
            load_binary=self._load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {
                "max_shared_mem": 232448,
                "multiprocessor_count": 132,
                "warpSize": target.warp_size,
            },
        )

    def _load(self, name, kernel, shared, device):
        self.loaded.append(name)
        return 1, len(self.loaded), 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, src, metadata):
        self.kernels.append(src.fn)

        def run(x, y, z, stream, function, packed, launch_metadata, enter, exit_, *arguments):
            self.launches.append(Launch((x, y, z), stream, function, arguments))

        return run

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1  # the device index of CPU tensors

    def get_current_stream(self, device: int) -> int:
        return self.stream


@contextlib.contextmanager
def installed(target: GPUTarget = SM_90) -> Iterator[FakeDriver]:
    """Launch kernels on the stand-in while the context is active; yields it."""
    fake = FakeDriver(target)
    with contextlib.ExitStack() as stack:
        for holder, name, value in (
            (common, "INTERPRETING", False),
            (common, "IS_AMD", target.backend == "hip"),
            (launch, "_current_device", fake.get_current_device),
            (launch, "_current_stream", lambda device: fake.get_current_stream(device)),
            (driver, "_active", fake),
        ):
            stack.enter_context(mock.patch.object(holder, name, value))
        yield fake
        # compiled kernels are unloaded by the driver that loaded them
        for kernel in fake.kernels:
            kernel.device_caches.clear()
        gc.collect()


@contextlib.contextmanager
def serving_cpu_tensors() -> Iterator[None]:
    """Force the Triton backend for CPU tensors while the context is active."""
    reason = dispatch.unsupported_reason

    def unsupported_reason(name, operator, device_type, dtype):
        return None if name == "triton" else reason(name, operator, device_type, dtype)

    with (
        mock.patch.object(dispatch, "unsupported_reason", unsupported_reason),
        dispatch.backend("triton"),
    ):
        yield
