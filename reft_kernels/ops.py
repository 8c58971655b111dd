"""PyTorch operators ``torch.ops.reft_kernels.*``: schemas, implementations and fakes.

The edit operators take these arguments:

    hidden      ``[M, d]``, fp32, bf16, fp16 or fp64.
    rows        int32 ``[N]``, the rows to edit; -1 skips an entry. None edits all M rows.
    weight_ids  int32 ``[N]``, the weight set of each row, or None for a single set.
    weights     ``[r, d]`` and ``[r]``, or ``[S, r, d]`` and ``[S, r]`` with ``weight_ids``.

For a selected row x, with A = ``read``, c = ``read_bias``, B = ``write`` and p = ``subtract_bias``,
``edit`` computes y:

    z = A x + c                 (z = c without ``read``; z = A x without ``read_bias``)
    u = act(z) - (B x + p)      (u = act(z) without ``subtract_projection``)
    y = x + B^T (coeff * u)

Methods that subtract a projection reuse the up-projection B, so ``subtract_projection`` is a flag.

``red`` computes y = scale * x + bias, with ``scale`` and ``bias`` ``[d]``, or ``[S, d]`` with
``weight_ids``. The operators ``householder`` and ``cayley`` are described in
:mod:`reft_kernels.orthonormal`.

``saved_input`` holds the selected input rows x ``[N, d]`` for the backward pass. ``edit`` without
``rows`` returns it empty, and the caller passes the output y to ``edit_backward``, which recomputes
x = y - B^T (coeff * u). ``red`` out of place without ``rows`` returns it empty too, and the caller
passes ``hidden`` to ``red_backward``. An output that a call does not need is an empty tensor.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels import allocation, dispatch, host_memory, operator_checks
from reft_kernels.arguments import EditArguments, EditBackwardArguments

_EDIT_ARGS = (
    "Tensor? rows, Tensor? weight_ids, Tensor? read, Tensor? read_bias, Tensor write, Tensor? "
    "subtract_bias, "
    "Tensor? coeff, bool subtract_projection, str activation, bool save"
)
_EDIT_BACKWARD_ARGS = (
    "Tensor saved_input, Tensor u, Tensor z, Tensor? rows, Tensor? weight_ids, Tensor? read, "
    "Tensor write, Tensor? coeff, "
    "bool subtract_projection, str activation"
)
_BUILD_ARGS = "Tensor X, Tensor? signs, Tensor? base, Tensor? base_point, Tensor? W"
_BUILD_BACKWARD_ARGS = (
    "Tensor? grad_R, Tensor? grad_D, Tensor X, Tensor? signs, Tensor? base, Tensor aux"
)

_RED_ARGS = "Tensor? rows, Tensor? weight_ids, Tensor scale, Tensor bias, bool save"
_RED_BACKWARD_ARGS = "Tensor saved_input, Tensor? rows, Tensor? weight_ids, Tensor scale"
_EDIT_GRADIENTS = (
    "Tensor grad_read, Tensor grad_read_bias, Tensor grad_write, Tensor grad_subtract_bias, "
    "Tensor grad_coeff"
)

SCHEMAS: dict[str, str] = {
    "edit": f"(Tensor hidden, {_EDIT_ARGS})"
    " -> (Tensor out, Tensor saved_input, Tensor u, Tensor z)",
    "edit_": f"(Tensor(a!) hidden, {_EDIT_ARGS}) -> (Tensor saved_input, Tensor u, Tensor z)",
    "edit_backward": f"(Tensor grad, {_EDIT_BACKWARD_ARGS}, bool need_hidden, bool need_weights)"
    f" -> (Tensor grad_hidden, {_EDIT_GRADIENTS})",
    "edit_backward_": f"(Tensor(a!) grad, {_EDIT_BACKWARD_ARGS}, bool need_weights)"
    f" -> ({_EDIT_GRADIENTS})",
    "red": f"(Tensor hidden, {_RED_ARGS}) -> (Tensor out, Tensor saved_input)",
    "red_": f"(Tensor(a!) hidden, {_RED_ARGS}) -> Tensor saved_input",
    "red_backward": f"(Tensor grad, {_RED_BACKWARD_ARGS}, bool need_hidden, bool need_weights)"
    " -> (Tensor grad_hidden, Tensor grad_scale, Tensor grad_bias)",
    "red_backward_": f"(Tensor(a!) grad, {_RED_BACKWARD_ARGS}, bool need_weights)"
    " -> (Tensor grad_scale, Tensor grad_bias)",
    "householder": f"({_BUILD_ARGS}) -> (Tensor R, Tensor D, Tensor aux)",
    "householder_backward": f"({_BUILD_BACKWARD_ARGS}) -> Tensor grad_X",
    "cayley": f"({_BUILD_ARGS}) -> (Tensor R, Tensor D, Tensor aux)",
    "cayley_backward": f"({_BUILD_BACKWARD_ARGS}) -> Tensor grad_X",
}
"""Schemas of all operators, by operator name."""

_library = torch.library.Library("reft_kernels", "DEF")


# ---- Implementations for backends other than cpu, whose operators are in csrc/cpu/registration.cpp


def _output_like(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Allocate a contiguous output like ``tensor``.

    It is uninitialized if ``rows`` is None, else a copy, because only some rows will be written.
    """
    out = host_memory.empty_like(tensor)
    return out if rows is None else out.copy_(tensor)


def _edit(backend: Callable, hidden: Tensor, rows: Tensor | None, *args):
    out = _output_like(hidden, rows)
    return out, *backend(hidden, out, rows, *args)


def _edit_(backend: Callable, hidden: Tensor, *args):
    return backend(hidden, hidden, *args)


def _edit_backward(backend: Callable, grad: Tensor, *args):
    *arguments, need_hidden, need_weights = args
    out = _output_like(grad, EditBackwardArguments(*arguments).rows) if need_hidden else None
    grads = backend(grad, out, *arguments, need_weights)
    return (grad.new_empty(0) if out is None else out), *grads


def _edit_backward_(backend: Callable, grad: Tensor, *args):
    return backend(grad, grad, *args)


def _red(backend: Callable, hidden: Tensor, rows: Tensor | None, weight_ids, scale, bias, save):
    out = _output_like(hidden, rows)
    # without rows the caller still has the input, so it need not be saved
    saved_input = backend(hidden, out, rows, weight_ids, scale, bias, save and rows is not None)
    return out, saved_input


def _red_(backend: Callable, hidden: Tensor, *args):
    return backend(hidden, hidden, *args)


def _red_backward(
    backend: Callable, grad: Tensor, saved_input, rows, weight_ids, scale, need_hidden, need_weights
):
    out = _output_like(grad, rows) if need_hidden else None
    grads = backend(grad, out, saved_input, rows, weight_ids, scale, need_weights)
    return (grad.new_empty(0) if out is None else out), *grads


def _red_backward_(backend: Callable, grad: Tensor, *args):
    return backend(grad, grad, *args)


def _build(backend: Callable, *args):
    return backend(*args)


# ---- Fake implementations: shapes and dtypes only


def _edit__fake(hidden, *args):
    *arguments, save = args
    a = EditArguments(*arguments)
    return allocation.edit_saved(hidden, a.rows, a.write, a.activation, save)


def _edit_fake(hidden, *args):
    return _output_fake(hidden), *_edit__fake(hidden, *args)


def _edit_backward__fake(grad, *args):
    *arguments, need_weights = args
    a = EditBackwardArguments(*arguments)
    return allocation.edit_gradients(
        grad, a.rows, a.read, a.write, a.coeff, a.subtract_projection, need_weights
    )


def _output_fake(tensor):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _hidden_grad_fake(grad, need_hidden):
    return _output_fake(grad) if need_hidden else grad.new_empty(0)


def _edit_backward_fake(grad, *args):
    *arguments, need_hidden, need_weights = args
    rest = _edit_backward__fake(grad, *arguments, need_weights)
    return _hidden_grad_fake(grad, need_hidden), *rest


def _red_fake(hidden, rows, weight_ids, scale, bias, save):
    return _output_fake(hidden), allocation.red_saved_input(hidden, rows, save and rows is not None)


def _red__fake(hidden, rows, weight_ids, scale, bias, save):
    return allocation.red_saved_input(hidden, rows, save)


def _red_backward__fake(grad, saved_input, rows, weight_ids, scale, need_weights):
    return allocation.red_gradients(grad, scale, need_weights)


def _red_backward_fake(grad, saved_input, rows, weight_ids, scale, need_hidden, need_weights):
    return _hidden_grad_fake(grad, need_hidden), *_red_backward__fake(
        grad, saved_input, rows, weight_ids, scale, need_weights
    )


def _build_fake(X, signs, base, base_point, W):
    return allocation.build(X, base, W)


def _build_backward_fake(grad_R, grad_D, X, signs, base, aux):
    return torch.empty_like(X, memory_format=torch.contiguous_format)


class _Operator(NamedTuple):
    """Implementations of an operator.

    ``implementation`` is called with a backend's function, followed by the operator's arguments.
    :func:`dispatch.select` selects that function by ``kind`` and by the device and dtype of the
    argument with index ``like``.
    """

    implementation: Callable
    fake: Callable
    kind: str
    like: int = 0


_OPERATORS = {
    "edit": _Operator(_edit, _edit_fake, "edit"),
    "edit_": _Operator(_edit_, _edit__fake, "edit"),
    "edit_backward": _Operator(_edit_backward, _edit_backward_fake, "edit_backward"),
    "edit_backward_": _Operator(_edit_backward_, _edit_backward__fake, "edit_backward"),
    "red": _Operator(_red, _red_fake, "red"),
    "red_": _Operator(_red_, _red__fake, "red"),
    "red_backward": _Operator(_red_backward, _red_backward_fake, "red_backward"),
    "red_backward_": _Operator(_red_backward_, _red_backward__fake, "red_backward"),
    "householder": _Operator(_build, _build_fake, "householder"),
    "householder_backward": _Operator(_build, _build_backward_fake, "householder_backward", like=2),
    "cayley": _Operator(_build, _build_fake, "cayley"),
    "cayley_backward": _Operator(_build, _build_backward_fake, "cayley_backward", like=2),
}


def _by_backend(name: str, operator: _Operator) -> Callable:
    """Return a function that runs the operator on the backend selected for its arguments."""
    overload = getattr(torch.ops.reft_kernels, name).default
    implementation, _, kind, like = operator

    def computed(*args):
        backend = dispatch.select(kind, args[like])
        return overload(*args) if backend is None else implementation(backend, *args)

    return computed


# attribute ``error``: the last exception in this thread that passed through the native library
_raised = threading.local()


def restored(error: Exception) -> Exception:
    """Return the original of an exception that has passed through the native library.

    The native library keeps only the message of a Python exception, not its type.

    Args:
        error: The exception that an operator raised.

    Returns:
        The last exception recorded in this thread if its message is that of ``error``, else
        ``error``.
    """
    known, _raised.error = getattr(_raised, "error", None), None
    return known if known is not None and str(known) == str(error) else error


def _handed_on(implementation: Callable, results: int) -> Callable:
    """Wrap an implementation so that the native library can call it.

    If ``implementation`` raises, the wrapper records the exception for :func:`restored`, passes the
    message to the native library, which raises an error with it, and returns empty tensors.

    Args:
        implementation: The operator's implementation in Python.
        results: The number of tensors that it returns.
    """

    def called(*args):
        try:
            return implementation(*args)
        except Exception as error:
            _raised.error = error
            torch.ops.reft_kernels_cpu.refuse(
                isinstance(error, (TypeError, ValueError)), str(error)
            )
            nothing = tuple(torch.empty(0) for _ in range(results))
            return nothing if results > 1 else nothing[0]

    return called


def direct(name: str, tensor: Tensor, checked: bool = False) -> Callable | None:
    """Return a function that runs an operator without PyTorch's dispatcher.

    The dispatcher serves modes, subclasses, function transforms, compilers and profilers. Where
    none of them is active, a backend that launches kernels from Python is called directly, because
    the dispatcher's call of a Python implementation takes longer than the launch.

    Args:
        name: An operator. The arguments of an edit's backward pass are not checked, because they
            come from its forward and from autograd.
        tensor: The argument that selects the backend.
        checked: Whether the caller has checked the arguments.

    Returns:
        The function, which takes the operator's arguments, or None if the call must go through
        ``torch.ops``.

    Raises:
        BackendError: If the forced backend does not support the operator, or no backend does.
    """
    if (
        (tensor.is_cpu and dispatch.serves_cpu_natively)
        or torch.compiler.is_compiling()
        or type(tensor) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return None
    key = (name, tensor.device, tensor.dtype, checked)
    try:
        return dispatch.direct_calls[key]
    except KeyError:
        return _direct_call(key)


def _direct_call(key: tuple[str, torch.device, torch.dtype, bool]) -> Callable | None:
    name, device, dtype, checked = key
    operator, forced = _OPERATORS[name], dispatch.forced_backend()
    backend = dispatch.launching(operator.kind, device.type, dtype)
    call: Callable | None = None
    if backend is not None:
        if name.endswith(("backward", "backward_")) or checked:
            call = functools.partial(operator.implementation, backend)
        else:
            call = operator_checks.checked(name, operator.implementation, backend)
    dispatch.keep_direct(key, call, forced)
    return call


_handed = torch.library.Library("reft_kernels_python", "DEF")

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _operator = _OPERATORS[_name]
    _implementation = operator_checks.guarded(_name, _schema, _by_backend(_name, _operator))
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    _handed.define(_name + _schema)
    _handed.impl(
        _name,
        _handed_on(_implementation, _schema.partition("->")[2].count("Tensor")),
        "CompositeExplicitAutograd",
    )
    _fake = operator_checks.guarded(_name, _schema, _operator.fake, traced=True)
    torch.library.register_fake(f"reft_kernels::{_name}", _fake, lib=_library)

dispatch.load_native()
