"""Launches of compiled Triton kernels.

Every Triton kernel of the project is launched by :func:`launch`. ``kernel[grid](...)`` binds and
specializes all arguments in Python on each call. :func:`launch` keeps the compiled kernel for each
class of arguments that Triton distinguishes and calls Triton's C launcher with it directly.

A kernel's parameters are tensors (or None) first, then integers, of which those marked
``do_not_specialize`` are first, then the constexpr parameters::

    @functools.lru_cache(maxsize=1024)
    def _bound(block_n: int, activation: str) -> launch.BoundKernel:
        return launch.BoundKernel(
            kernel, {"ACTIVATION": activation, "BLOCK_N": block_n}, {"num_warps": 4}
        )

    launch.launch(_bound(32, "linear"), (blocks,), (x, None, out), (num_rows, d))

Callers look up ``launch.launch`` in this module for each launch, so that tests can replace it to
record launches.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from reft_kernels.triton import common

_compile_lock = threading.Lock()
_knobs = knobs.runtime

# Private, but without the Python code of torch.cuda.current_device and current_stream; Triton and
# Inductor use them too. Absent in builds of PyTorch without a GPU.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class BoundKernel:
    """A kernel with its constexpr arguments and compiler options.

    Create it once for each configuration, not for each launch: it holds the compiled kernels.

    Args:
        kernel: A function decorated with ``triton.jit``.
        constants: Values of the constexpr parameters, which are the kernel's last parameters.
        options: Launch options such as ``num_warps`` and ``num_stages``.

    Raises:
        ValueError: If ``constants`` does not name exactly the kernel's constexpr parameters, or if
            these are not the last ones, or if the parameters marked ``do_not_specialize`` do not
            follow each other.
    """

    __slots__ = ("compiled", "constants", "kernel", "num_fixed", "num_tensors", "options", "values")

    def __init__(self, kernel: Any, constants: Mapping[str, Any], options: Mapping[str, Any]):
        names = list(kernel.arg_names)
        split = len(names) - len(constants)
        if set(names[split:]) != set(constants):
            raise ValueError(
                f"constants: got {sorted(constants)}, expected the last parameters of "
                f"{kernel.__name__}, {names[split:]}"
            )
        self.kernel = kernel
        self.constants = dict(constants)
        self.options = dict(options)
        self.values = tuple(constants[name] for name in names[split:])
        fixed = [p.num for p in getattr(kernel, "params", ()) if p.do_not_specialize]
        self.num_fixed = len(fixed)
        self.num_tensors = fixed[0] if fixed else None  # None: not known from the declaration
        if fixed and fixed != list(range(fixed[0], fixed[0] + len(fixed))):
            raise ValueError(
                f"do_not_specialize: got parameters {fixed} of {kernel.__name__}, expected the "
                "first integers"
            )
        self.compiled: dict[tuple, tuple] = {}

    def __repr__(self) -> str:
        return f"BoundKernel({self.kernel.__name__}, {self.constants}, {self.options})"


class Recorded(NamedTuple):
    """A launch that used a kept kernel."""

    kernel: Any  # the function decorated with triton.jit
    compiled: Any
    grid: tuple[int, int, int]
    tensors: tuple[Tensor | None, ...]
    integers: tuple[int, ...]


class _Recorder(threading.local):
    launches: list[Recorded | None] | None = None


_recorder = _Recorder()


@contextlib.contextmanager
def recorded() -> Iterator[list[Recorded | None]]:
    """Record this thread's launches; yields their list.

    None stands for a launch that did not use a kept kernel, because Triton's interpreter ran it or
    a launch hook was installed.
    """
    before, _recorder.launches = _recorder.launches, []
    try:
        yield _recorder.launches
    finally:
        _recorder.launches = before


def specialization_key(
    bound: BoundKernel,
    device: int,
    tensors: Sequence[Tensor | None],
    pointers: Sequence[int],
    integers: Sequence[int],
) -> tuple:
    """Return a key that is equal only for launches that Triton serves with one compiled kernel.

    Triton distinguishes the device; the dtype of each tensor, whether it is None and whether its
    address is a multiple of 16; for each integer its width and, unless it is marked
    ``do_not_specialize``, whether it is 1 or a multiple of 16. On AMD GPUs it also distinguishes
    tensors whose storage is smaller than 2 GiB.

    Args:
        bound: The kernel.
        device: Index of the device.
        tensors: The kernel's tensor arguments.
        pointers: Their addresses; 0 for None.
        integers: The kernel's integer arguments.
    """
    fixed = bound.num_fixed
    key = (
        device,
        # which addresses are multiples of 16; 0 if all are
        reduce(or_, pointers) & 15 and tuple([not p & 15 for p in pointers]),
        *[None if t is None else t.dtype for t in tensors],
        *[v >> 31 for v in integers[:fixed]],
        # the last term distinguishes values that do not fit into int32
        *[v if v < 2 else 2 + (not v & 15) + (v >> 31 << 2) for v in integers[fixed:]],
    )
    if common.IS_AMD:
        small = [t is None or t.untyped_storage().nbytes() < 1 << 31 for t in tensors]
        return (*key, *small)
    return key


def _has_hooks(bound: BoundKernel) -> bool:
    """Return whether Triton must run launch hooks, such as those of a profiler."""
    before, after = _knobs.launch_enter_hook, _knobs.launch_exit_hook
    # an empty HookChain is the default; None and single functions can be assigned
    return bool(
        (before is not None and getattr(before, "calls", True))
        or (after is not None and getattr(after, "calls", True))
        or bound.kernel.pre_run_hooks
    )


def _launch_first(
    bound: BoundKernel,
    key: tuple | None,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
) -> None:
    """Launch through Triton, which compiles the kernel if necessary; keep it if a key is given."""
    if bound.num_tensors not in (None, len(tensors)):
        raise ValueError(
            f"tensors: got {len(tensors)} for {bound.kernel.__name__}, expected "
            f"{bound.num_tensors}, as many as parameters before those marked do_not_specialize"
        )
    call: Callable = bound.kernel[grid]
    if key is None:
        call(*tensors, *integers, **bound.constants, **bound.options)
        return
    with _compile_lock:
        compiled = call(*tensors, *integers, **bound.constants, **bound.options)
    # None if a hook of Triton cancelled the compilation
    if getattr(compiled, "function", None) is not None:
        # the last entry keeps the kernel loaded
        bound.compiled[key] = (compiled.run, compiled.function, compiled.packed_metadata, compiled)


def launch(
    bound: BoundKernel,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor | None],
    integers: Sequence[int],
) -> None:
    """Launch a kernel on the current stream of the tensors' device.

    The first launch with a new :func:`specialization_key` and every launch while a launch hook is
    installed go through ``kernel[grid]``, as do all in Triton's interpreter. Triton's settings
    (:mod:`triton.knobs`), apart from launch hooks, have their values of the first launch. Thread
    safe.

    Args:
        bound: The kernel with its constexpr arguments.
        grid: One to three positive integers.
        tensors: The kernel's tensor arguments, with None for absent ones; at least one is given.
        integers: The kernel's integer arguments, not bool.
    """
    recording = _recorder.launches
    if common.INTERPRETING:
        _launch_first(bound, None, grid, tensors, integers)
        if recording is not None:
            recording.append(None)
        return
    first = tensors[0]
    if first is None:
        first = next(t for t in tensors if t is not None)
    device = first.get_device()
    if device != _current_device():
        # a model distributed over several GPUs
        with torch.cuda.device(device):
            launch(bound, grid, tensors, integers)
        return
    if _has_hooks(bound):
        _launch_first(bound, None, grid, tensors, integers)
        if recording is not None:
            recording.append(None)
        return
    # Triton omits arguments that are None from the compiled kernel's parameters
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    key = specialization_key(bound, device, tensors, pointers, integers)
    kept = bound.compiled.get(key)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if kept is None:
        _launch_first(bound, key, grid, tensors, integers)
        kept = bound.compiled.get(key)
    else:
        run, function, metadata, _ = kept
        stream = _current_stream(device)
        values = bound.values
        run(x, y, z, stream, function, metadata, None, None, None, *pointers, *integers, *values)
    if recording is not None:
        recording.append(
            None
            if kept is None
            else Recorded(bound.kernel, kept[3], (x, y, z), tuple(tensors), tuple(integers))
        )


_original_launch = launch  # the host library repeats launches only while it is not replaced
