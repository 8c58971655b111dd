"""Descriptions of recorded launches, from which the host library repeats them.

The host library (:mod:`reft_kernels.host_calls`) knows nothing of configurations, grids and
specialization. It lets the launchers of this package run the first call of each class of arguments
under :func:`reft_kernels.triton.launch.recorded`, and repeats the recorded launches with the
addresses of later calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from reft_kernels.triton import launch

POINTER, INT32, INT64 = range(3)  # kinds of parameters, as in csrc/host/plans.h
_KINDS = {"i32": INT32, "i64": INT64}
_MAX_SHARED = 228 * 1024  # more needs an attribute of the launch


class LaunchDescription(NamedTuple):
    """A launch of a compiled kernel."""

    function: int  # handle of the compiled kernel
    x: int  # grid
    y: int
    z: int
    threads: int  # in a block
    shared: int  # bytes of dynamic shared memory
    parameters: tuple[tuple[int, int], ...]  # kind, and value or index of the pointer's tensor


class Plan(NamedTuple):
    """The launches of a call."""

    kernels: tuple[Any, ...]  # Triton's JIT functions, which may have hooks
    compiled: tuple[Any, ...]  # the compiled kernels, to keep them loaded
    workspace_bytes: int
    launches: tuple[LaunchDescription, ...]


def plan_of(
    launches: Sequence[launch.Recorded | None],
    tensors: Sequence[Tensor | None],
    workspace: int | None = None,
) -> Plan | None:
    """Return the plan of recorded launches, or None if it cannot be repeated.

    Args:
        launches: The recorded launches; None stands for one that did not use a kept kernel.
        tensors: The call's arguments and results, by index; None for absent ones.
        workspace: Index of the call's temporary memory, the only other tensor that a launch may
            take. None if there is none.
    """
    indices = {id(t): i for i, t in reversed(list(enumerate(tensors))) if t is not None}
    temporary: Tensor | None = None
    described = []
    for recorded in launches:
        if recorded is None or not _is_plain(recorded.compiled.metadata):
            return None
        for tensor in recorded.tensors:
            if tensor is None or id(tensor) in indices:
                continue
            if workspace is None or temporary is not None:
                return None
            temporary = tensor
            indices[id(tensor)] = workspace
        launched = _described(recorded, indices)
        if launched is None:
            return None
        described.append(launched)
    return Plan(
        tuple(dict.fromkeys(r.kernel for r in launches if r is not None)),
        tuple(r.compiled for r in launches if r is not None),
        0 if temporary is None else temporary.nbytes,
        tuple(described),
    )


def _is_plain(metadata: Any) -> bool:
    """Return whether a kernel is launched without attributes and scratch memory."""
    unwanted = (
        "launch_cooperative_grid",
        "launch_pdl",
        "global_scratch_size",
        "profile_scratch_size",
        "instrumentation_mode",
    )
    return (
        getattr(metadata, "num_ctas", 1) == 1
        and metadata.shared <= _MAX_SHARED
        and not any(getattr(metadata, name, None) for name in unwanted)
    )


def _described(recorded: launch.Recorded, indices: dict[int, int]) -> LaunchDescription | None:
    """Describe a launch; None if a parameter has an unknown type.

    Triton's launchers pass the parameters that are not constexpr, in the order of the declaration;
    None and, unless ``do_not_specialize`` is set, 1 are constexpr.
    """
    types = list(recorded.compiled.src.signature.values())
    parameters = []
    arguments = [*recorded.tensors, *recorded.integers]
    for kind, argument in zip(types[: len(arguments)], arguments, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(argument, Tensor) and kind.startswith("*"):
            parameters.append((POINTER, indices[id(argument)]))
        elif isinstance(argument, int) and kind in _KINDS:
            parameters.append((_KINDS[kind], argument))
        else:
            return None
    if any(kind != "constexpr" for kind in types[len(arguments) :]):
        return None
    metadata = recorded.compiled.metadata
    return LaunchDescription(
        recorded.compiled.function,
        *recorded.grid,
        metadata.num_warps * metadata.target.warp_size,
        metadata.shared,
        tuple(parameters),
    )
