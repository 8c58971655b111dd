"""Recording of the launches that an operator of the CUDA backend makes, without a GPU.

The host code of ``csrc/cuda``, compiled by nvcc, runs with a CUDA runtime that records launches
(recorder.cpp), so grids, clusters, shared memory and arguments are those of a GPU. The library
serves CPU tensors, whose content is never read or written.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import model, native, reading
from benchmarks.roofline.compiling import Compiled
from benchmarks.roofline.execution import Machine
from benchmarks.roofline.targets import Target
from benchmarks.roofline.traces import Buffer, Trace
from benchmarks.roofline.tracing import buffer

HERE = Path(__file__).resolve().parent
HOST_ARCH = "sm_90"  # host code does not depend on it
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_")
_SCRATCH = 256 << 20  # bytes, more than any launch uses


class NotServed(NotImplementedError):
    """The kernels of ``csrc/cuda`` do not serve a call, which Triton then computes."""


@dataclass(frozen=True)
class NativeLaunch:
    """One recorded launch.

    Attributes:
        symbol: Name of the kernel in the library.
        grid: Number of blocks on each of three axes.
        threads: Threads of a block.
        cluster: Blocks of a cluster; 1 without clusters.
        shared: Bytes of dynamic shared memory.
        arguments: Bytes of the arguments.
        tensors: Tensors of the operator's call by name.
    """

    symbol: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared: int
    arguments: bytes
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Name of the kernel template."""
        return native.identity(self.symbol)[0]

    @property
    def programs(self) -> int:
        """Number of blocks."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor."""
        return {name: t.numel() * t.element_size() for name, t in self.tensors.items()}


def _source(symbol: str) -> Path:
    found = _SOURCE.search(symbol)
    if found is None:
        raise ValueError(f"symbol: got {symbol!r}, expected that of a kernel of csrc/cuda")
    return native.SOURCES / f"{found[1]}.cu"


@functools.lru_cache(maxsize=256)
def _built(symbol: str, arch: str) -> tuple[native.Built, str]:
    """Return the build of a kernel's source for an architecture, and its name there."""
    built = native.build(_source(symbol), arch)
    wanted = native.identity(symbol)
    for name in native.symbols(built):
        if native.identity(name) == wanted:
            return built, name
    raise ValueError(f"symbol: {symbol!r} has no counterpart for {arch}")


def compile_launch(launch: NativeLaunch, target: Target) -> Compiled:
    """Compile the kernel of a launch for a target."""
    built, name = _built(launch.symbol, target.name)
    code, used, kernel = native.machine_code(built, name)
    region = reading.read(code)
    return Compiled(
        launch.name,
        target,
        used["REG"],
        used["STACK"],
        reading.total(region, "local"),
        launch.shared + used["SHARED"],
        launch.threads,
        region,
        kernel,
        "",
        code,
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """Build and load the library that records, and register its operators."""
    sources = sorted(native.SOURCES.glob("*.cu"))
    hosts = [native.build(source, HOST_ARCH).host for source in sources]
    build, compiler = native.builder(), native.nvcc()
    assert compiler is not None
    files = [HERE / "recorder.cpp", native.SOURCES / "registration.cpp"]
    digest = hashlib.sha256(torch.__version__.encode() + "".join(map(str, hosts)).encode())
    for file in (*files, native.SOURCES / "device.h"):
        digest.update(file.read_bytes())
    library = native.CACHE / f"recorder-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        partial = library.with_suffix(".partial")
        folder = build.torch_folder()
        command = [
            *build.compiler().split(),
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-fvisibility=hidden",
            "-shared",
            "-Wl,-Bsymbolic",
            "-DREFT_CUDA_EMULATED",
            f"-DTORCH_TARGET_VERSION={build.TARGET_TORCH}",
            f"-isystem{folder / 'include'}",
            f"-isystem{build._toolkit(compiler) / 'include'}",
            f"-I{native.SOURCES}",
            *map(str, (*files, *hosts)),
            f"-L{folder / 'lib'}",
            "-ltorch_cpu",
            "-o",
            str(partial),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the recorder does not build: {done.stderr[-4000:]}")
        partial.replace(library)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.roofline_kernel.restype = ctypes.c_char_p
    loaded.roofline_arguments.restype = ctypes.c_void_p
    return loaded


_Sizes = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))
_Occupancy = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int
)


class _Recorder(TorchDispatchMode):
    """Collects the launches of each operator of the library with the operator's tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self.library, self.launches = library, list[NativeLaunch]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "reft_kernels_cuda":
            names = [argument.name for argument in func._schema.arguments]
            tensors = {
                name: value
                for name, value in zip(names, args, strict=False)
                if isinstance(value, Tensor) and value.numel()
            }
            self.launches += [
                self._launch(number, tensors) for number in range(self.library.roofline_launches())
            ]
            self.library.roofline_clear()
        return result

    def _launch(self, number: int, tensors: dict[str, Tensor]) -> NativeLaunch:
        values = (ctypes.c_int64 * 7)()
        self.library.roofline_launch(number, values)
        x, y, z, threads, cluster, shared, size = values
        arguments = ctypes.string_at(self.library.roofline_arguments(number), size)
        symbol = self.library.roofline_kernel(number).decode()
        return NativeLaunch(symbol, (x, y, z), threads, cluster, shared, arguments, tensors)


def record(
    target: Target, call: Callable[[], Any], device: model.Device = model.H200
) -> list[NativeLaunch]:
    """Return the launches that ``call`` makes on a GPU of the target's architecture.

    Raises:
        NotServed: If the kernels of ``csrc/cuda`` do not serve the call.
    """

    def sizes(symbol: bytes, to: Any) -> int:
        built, name = _built(symbol.decode(), target.name)
        parameters = native.machine_code(built, name)[2].parameters
        for k, parameter in enumerate(parameters):
            to[k] = parameter.size
        return len(parameters)

    def occupancy(symbol: bytes, threads: int, shared: int, cluster: int) -> int:
        built, name = _built(symbol.decode(), target.name)
        registers = native.machine_code(built, name)[1]["REG"]
        each = model.fitting(registers, threads, shared, device)
        return model.resident_clusters(each, cluster, device) if cluster else each

    def elsewhere(operator: str) -> Callable:
        raise NotServed(f"{operator}: served by Triton")

    library = _library()
    callbacks = _Sizes(sizes), _Occupancy(occupancy)
    library.roofline_device(int(target.arch), device.processors, *callbacks)
    library.roofline_clear()
    backend = importlib.import_module("reft_kernels.cuda")
    with mock.patch.object(backend, "_elsewhere", elsewhere), _Recorder(library) as recorder:
        call()
    return recorder.launches


def machine(launch: NativeLaunch, compiled: Compiled) -> Machine:
    """Prepare the execution of blocks of a launch."""
    kernel = compiled.kernel
    assert kernel is not None
    buffers = [buffer(name, tensor) for name, tensor in launch.tensors.items()]
    if kernel.parameters[-1].size == 8:  # scratch memory of the orthonormal maps, or null
        address = int.from_bytes(launch.arguments[-8:], "little")
        buffers += [Buffer("scratch", address, _SCRATCH)] if address else []
    return Machine(kernel, launch.arguments, buffers, launch.threads, launch.grid)


def samples(launch: NativeLaunch) -> list[tuple[int, int, int]]:
    """Return the first blocks of a first, a middle and a late cluster.

    The last block of a grid may do what no other does.
    """
    clusters = launch.grid[0] // launch.cluster
    numbers = sorted({0, clusters // 2, max(clusters // 2, clusters - 2)})
    return [(number * launch.cluster, 0, 0) for number in numbers]


def traces(launch: NativeLaunch, compiled: Compiled) -> list[Trace]:
    """Execute the sample blocks of a launch."""
    runner = machine(launch, compiled)
    return [runner.run(block) for block in samples(launch)]
