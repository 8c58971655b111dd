"""Edits whose host part runs in C++: argument checks, allocation, autograd node and launches.

The library built from ``csrc/host`` serves :func:`reft_kernels.autograd.apply_edit` where no mode,
subclass, function transform, compiler or profiler is involved and the arguments are known to be
valid, on two routes: the ``cpu`` backend through its operators, and the ``triton`` backend through
plans (:mod:`reft_kernels.triton.plans`). Everything else, errors included, is left to Python.

An autograd node in C++ needs PyTorch's C++ interface, which differs between releases. The library
therefore works only with the versions of Python and PyTorch that it was built for, which are in its
file name; with others, and where it was not built, Python serves every call.

``REFT_KERNELS_HOST_LIBRARY`` is 0 to leave it unused, or the path of another build.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels import cpu, dispatch, ops
from reft_kernels.arguments import EditArguments, EditBackwardArguments

LIBRARY_VARIABLE = "REFT_KERNELS_HOST_LIBRARY"
CPU, TRITON, PYTHON = 1, 2, 3  # routes, as in csrc/host/call.h
# Index of the temporary memory among the tensors of a call, as in csrc/host/compute.cpp
_EDIT_WORKSPACE = 11
_BACKWARD_WORKSPACE = 9

apply_edit: Callable[..., Tensor | None] | None = None
"""As :func:`reft_kernels.autograd.apply_edit`, or None for a call that Python must serve."""

library: Any = None  # the loaded module


def file_name() -> str:
    """Return the name of the library for this Python and this PyTorch."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return f"_native_host-{python}-torch{torch.__version__.partition('+')[0]}.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Load the library on the first call; return None, or the reason why it is not used."""
    global apply_edit, library
    wanted = os.environ.get(LIBRARY_VARIABLE)
    if wanted == "0":
        return f"{LIBRARY_VARIABLE} is 0"
    path = Path(wanted) if wanted else Path(__file__).with_name(file_name())
    if not path.exists():
        if wanted:
            return f"{LIBRARY_VARIABLE}: got {wanted!r}, expected 0 or an existing file"
        return f"{path.name} was not built"
    loader = ExtensionFileLoader("_native_host", str(path))
    spec = importlib.util.spec_from_loader("_native_host", loader)
    assert spec is not None
    try:
        library = importlib.util.module_from_spec(spec)
    except ImportError as error:
        return f"{path.name} does not load into torch {torch.__version__}: {error}"
    loader.exec_module(library)
    library.set_callbacks(_route, _edit, _edit_backward)
    dispatch.on_change.append(library.reset)
    apply_edit = library.apply_edit
    return None


def _route(tensor: Tensor) -> int:
    """Return the route of edits of hidden states with the device type and dtype of ``tensor``."""
    if tensor.is_cpu and dispatch.serves_cpu_natively:
        library.set_cpu_kernels(_address_of_cpu_kernels())
        return CPU
    try:
        backends = {
            dispatch.choose(operator, tensor.device.type, tensor.dtype)[0]
            for operator in ("edit", "edit_backward")
        }
    except dispatch.BackendError:  # raised again by the operator
        return PYTHON
    if backends != {"triton"}:
        return PYTHON
    from reft_kernels.triton import common

    return PYTHON if common.INTERPRETING else TRITON


def _address_of_cpu_kernels() -> int:
    """Return the address of the CPU library's function for direct calls, 0 if it has none."""
    function = getattr(ctypes.CDLL(str(cpu.LIBRARY)), "reft_kernels_cpu_direct", None)
    return (ctypes.cast(function, ctypes.c_void_p).value or 0) if function else 0


def _run(key: bytes | None, name: str, arguments: tuple, tensors: Callable, workspace: int) -> Any:
    """Run an operator; with a key, also hand the plan of its launches to the library.

    ``tensors`` makes the tensors of the plan, by index, of the operator's results.
    """
    operator = getattr(torch.ops.reft_kernels, name).default
    call = ops.direct(name, arguments[0], checked=True) or operator
    if key is None:
        return call(*arguments)
    from reft_kernels.triton import launch, plans

    with launch.recorded() as launches:
        results = call(*arguments)
    plan = plans.plan_of(launches, tensors(results), workspace)
    if plan is not None:
        library.add_plan(key, *plan)
    return results


def _edit(key: bytes | None, hidden: Tensor, *values: Any) -> tuple[Tensor | None, ...]:
    """Run an edit; ``values`` are the fields of EditArguments, ``save`` and ``in_place``.

    Returns:
        ``out`` (None in place) and ``saved_input``, ``u`` and ``z``, each None if unused.
    """
    *fields, save, in_place = values
    edit = EditArguments(*fields)

    def tensors(results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        out = hidden if in_place else results[0]
        weights = (edit.read, edit.read_bias, edit.write, edit.subtract_bias, edit.coeff)
        return hidden, out, edit.rows, *weights, *results[-3:], None

    name = "edit_" if in_place else "edit"
    results = _run(key, name, (hidden, *edit, save), tensors, _EDIT_WORKSPACE)
    saved_input, u, z = results[-3:]
    return (
        None if in_place else results[0],
        saved_input if save and edit.rows is not None else None,
        u if save else None,
        z if save and edit.activation != "linear" else None,
    )


def _edit_backward(key: bytes | None, grad: Tensor, *values: Any) -> tuple[Tensor | None, ...]:
    """Run a backward pass.

    ``values`` are the fields of EditBackwardArguments (``z`` may be None), ``in_place``,
    ``need_hidden`` and ``need_weights``.

    Returns:
        dL/dhidden (None in place) and the five other gradients, each None if unused.
    """
    *fields, in_place, need_hidden, need_weights = values
    saved = EditBackwardArguments(*fields)
    if saved.z is None:
        saved = saved._replace(z=saved.u.new_empty(0))

    def tensors(results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        out = grad if in_place else results[0] if need_hidden else None
        return grad, out, *saved[:4], saved.read, saved.write, saved.coeff, None, *results[-5:]

    name = "edit_backward_" if in_place else "edit_backward"
    needs = (need_weights,) if in_place else (need_hidden, need_weights)
    results = _run(key, name, (grad, *saved, *needs), tensors, _BACKWARD_WORKSPACE)
    grad_read, grad_read_bias, grad_write, grad_subtract_bias, grad_coeff = results[-5:]
    return (
        results[0] if need_hidden and not in_place else None,
        grad_read if need_weights and saved.read is not None else None,
        grad_read_bias if need_weights else None,
        grad_write if need_weights else None,
        grad_subtract_bias if need_weights and saved.subtract_projection else None,
        grad_coeff if saved.coeff is not None else None,
    )


unavailable_reason()
