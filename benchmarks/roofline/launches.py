"""Recording of the launches that an operator of the Triton backend makes, without a GPU.

The real launchers run on CPU tensors; a recorder takes the place of the launch. The recorded
arguments are then specialized as Triton's own launcher does: absent arguments, arguments that are
1, and multiples of 16.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

from benchmarks.roofline.targets import Target
from reft_kernels.dispatch import interpreting

PROCESSORS = 132  # multiprocessors of an H100 or H200, which some launchers ask for


class AnyLaunch(Protocol):
    """What the model needs to know about a launch, of Triton or of ``csrc/cuda``.

    Attributes:
        grid: Number of programs on each of three axes.
        programs: Number of programs.
        cluster: Programs of a cluster; 1 without clusters.
        sizes: Bytes of each tensor argument.
    """

    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def programs(self) -> int: ...
    @property
    def cluster(self) -> int: ...
    @property
    def sizes(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Launch:
    """One recorded launch.

    Attributes:
        kernel: The :class:`triton.runtime.JITFunction`.
        grid: Number of programs on each of three axes.
        arguments: All arguments by name, constexprs included.
        options: Compiler options, such as ``num_warps``.
        cluster: Programs of a cluster, which Triton launches here without.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]
    cluster: int = 1

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.__name__

    @property
    def programs(self) -> int:
        """Number of programs."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor argument."""
        return {
            name: value.numel() * value.element_size()
            for name, value in self.arguments.items()
            if hasattr(value, "element_size")
        }


def _forget() -> None:
    """Clear what the launchers keep between calls, which depends on the target."""
    for name, module in list(sys.modules.items()):
        if name.startswith("reft_kernels.triton"):
            for function in vars(module).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()


@contextlib.contextmanager
def _as_on(target: Target) -> Iterator[None]:
    """Let the launchers decide as on the target."""
    common = importlib.import_module("reft_kernels.triton.common")
    build = importlib.import_module("reft_kernels.triton.orthonormal_launch")
    amd = target.backend == "hip"
    options = {} if amd else common.CUDA_OPTIONS
    _forget()
    with (
        mock.patch.object(common, "IS_AMD", amd),
        mock.patch.object(common, "compile_options", lambda of: options),
        mock.patch.object(build, "processors", lambda device: PROCESSORS),
    ):
        yield
    _forget()


@contextlib.contextmanager
def _recorder(launches: list[Launch]) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def run(kernel, *args, grid, warmup, **kwargs):
        names = kernel.arg_names
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in names if name in kwargs}
        whole = (*(grid(arguments) if callable(grid) else grid), 1, 1)
        options = {name: value for name, value in kwargs.items() if value is not None}
        launches.append(Launch(kernel, whole[:3], arguments, options))

    def launch(bound, grid, tensors, integers):
        run(
            bound.kernel,
            *tensors,
            *integers,
            grid=grid,
            warmup=False,
            **bound.constants,
            **bound.options,
        )

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        if importlib.util.find_spec("reft_kernels.triton.launch") is not None:
            module = importlib.import_module("reft_kernels.triton.launch")
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield


def record(target: Target, call: Callable[[], Any]) -> list[Launch]:
    """Return the launches that ``call`` makes, as on a target.

    Outputs of the kernels are not written. ``call`` uses CPU tensors.

    Raises:
        RuntimeError: If Triton interprets its kernels, or ``call`` launches nothing.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET: got 1, expected 0; interpreted code is not compiled")
    launches: list[Launch] = []
    with _as_on(target), _recorder(launches):
        call()
    if not launches:
        raise RuntimeError("call: expected at least one launch of a kernel, got none")
    return launches


def source(launch: Launch, target: Target) -> tuple[Any, dict[str, Any]]:
    """Return the specialized source of a launch for ``triton.compile``, and its options."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import jit

    backend = make_backend(gpu(target))
    kernel = launch.kernel
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.options)
    packed = kernel._pack_args(backend, dict(launch.options), bound, specialization, options)
    parsed, signature, constexprs, attributes = packed
    return ASTSource(kernel, signature, constexprs, attributes), parsed.__dict__


def gpu(target: Target) -> Any:
    """Return Triton's description of a target."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)
