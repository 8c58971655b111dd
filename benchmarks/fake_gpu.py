"""A stand-in for Triton's GPU driver: kernels are compiled for a GPU, and launches are recorded.

CPU tensors take the place of GPU tensors. Nothing runs, so outputs are not written.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from reft_kernels import dispatch, host_calls
from reft_kernels.triton import common

launch = importlib.import_module("reft_kernels.triton.launch")
SM_90 = GPUTarget("cuda", 90, 32)


class Launch(NamedTuple):
    """A launch as Triton's C launcher receives it."""

    grid: tuple[int, int, int]
    stream: int
    function: int  # identifies the compiled kernel
    arguments: tuple  # of all parameters, with addresses or tensors for pointers


class DriverLaunch(NamedTuple):
    """A launch as the GPU driver's launch function receives it from the host library."""

    function: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    parameters: tuple[int, ...]  # of the compiled kernel, then Triton's two scratch pointers


LAUNCH_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


CURRENT_STREAM = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64)


def address_of(function: Any) -> int:
    """Return the address of a function of type ``LAUNCH_FUNCTION`` or ``CURRENT_STREAM``."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class FakeDriver:
    """Implements what ``JITFunction.run`` and ``CompiledKernel`` use of a driver."""

    def __init__(self, target: GPUTarget = SM_90):
        self.target = target
        self.launches: list[Launch] = []
        self.driver_launches: list[DriverLaunch] = []
        self.signatures: dict[int, list[str]] = {}  # types of the parameters, by function
        self.launch_function = LAUNCH_FUNCTION(self._launch)
        self.stream_function = CURRENT_STREAM(self.get_current_stream)
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
            self.signatures[function] = list(src.signature.values())

        return run

    def _launch(self, function, x, y, z, bx, by, bz, shared, stream, parameters, extra):
        types = [
            ctypes.c_int32 if kind == "i32" else ctypes.c_int64
            for kind in self.signatures[function]
            if kind != "constexpr"
        ]
        values = [
            kind.from_address(address).value
            for kind, address in zip([*types, ctypes.c_int64, ctypes.c_int64], parameters)  # noqa: B905  (a pointer has no length)
        ]
        self.driver_launches.append(
            DriverLaunch(function, (x, y, z), (bx, by, bz), shared, stream or 0, tuple(values))
        )
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -1  # the device index of CPU tensors

    def get_current_stream(self, device: int) -> int:
        return self.stream


@contextlib.contextmanager
def _host_library(fake: FakeDriver) -> Iterator[None]:
    """Let the host library, if there is one, launch on the stand-in while the context is active."""
    library = host_calls.library
    if library is None:
        yield
        return
    library.reset()
    library.replace_driver(address_of(fake.launch_function), address_of(fake.stream_function))
    try:
        yield
    finally:
        library.reset()
        library.replace_driver(0, 0)


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
        _forget_kernels(fake)  # of another driver
        stack.callback(_forget_kernels, fake)  # which unloads them
        stack.enter_context(_host_library(fake))
        yield fake


def _forget_kernels(fake: FakeDriver) -> None:
    for kernel in fake.kernels:
        kernel.device_caches.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("reft_kernels.triton."):
            for attribute, function in vars(module).items():
                if attribute.startswith("_bound"):  # caches of BoundKernel, which hold kernels
                    function.cache_clear()
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
