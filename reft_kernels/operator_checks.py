"""Argument checks of the operators ``torch.ops.reft_kernels.*``.

An operator checks its arguments before it allocates or writes anything. These checks also protect
programs that call the operators directly. The public functions have their own checks in
:mod:`reft_kernels.checks`, whose errors use the parameter names of those functions. The ``cpu``
backend implements the checks in the native library (``csrc/cpu/argument_checks.h``).

Shapes, dtypes and devices are checked in the implementations and in the fakes. The values of
``rows`` and ``weight_ids`` are checked only in the implementations, once per tensor: CPU tensors by
:func:`reft_kernels.checks.check_row_values`, CUDA tensors by an assertion on the device
(:func:`reft_kernels.checks.assert_range`), which does not synchronize.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reft_kernels.activations import ACTIVATIONS
from reft_kernels.arguments import BuiltWeights, EditWeights
from reft_kernels.checks import (
    HIDDEN_DTYPES,
    are_rows_known,
    assert_range,
    check_row_values,
    check_weight_id_values,
    describe,
    has_shared_elements,
)
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.orthonormal import MAX_RANK

_Shape = tuple[int, ...]
_Index = Tensor | None
_DTYPES = frozenset(HIDDEN_DTYPES)
_DTYPE_NAMES = ", ".join(map(str, HIDDEN_DTYPES))


def _refuse(kind: type[Exception], name: str, value: object, expected: str) -> None:
    raise kind(f"{name}: got {describe(value)}, expected {expected}")


def _check_place(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        _refuse(ValueError, name, tensor, f"{like.device}, as the others")
    if tensor.layout is not torch.strided:
        _refuse(ValueError, name, tensor, f"layout torch.strided, not {tensor.layout}")


def _check_apart(op: str, written: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError if a contiguous argument overlaps the memory of ``written``.

    Nothing is checked if ``written`` is not contiguous.
    """
    if not written.is_contiguous():
        return
    begin, size = written.data_ptr(), written.nbytes
    for name, other in others.items():
        if other is None:
            continue
        offset = other.data_ptr() - begin
        if offset >= size or (offset < 0 and offset + other.nbytes <= 0) or not other.numel():
            continue
        if other.is_contiguous():
            _refuse(ValueError, f"{op}: {name}", other, "memory apart from what is written")


def _check_hidden(name: str, hidden: Tensor, in_place: bool) -> None:
    if hidden.dtype not in _DTYPES:
        _refuse(TypeError, name, hidden, f"one of {_DTYPE_NAMES}")
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        _refuse(ValueError, name, hidden, "[M, d] with d >= 1")
    _check_place(name, hidden, hidden)
    if in_place and has_shared_elements(hidden):
        _refuse(ValueError, name, hidden, f"no elements at one address (strides {hidden.stride()})")


def _check_float(name: str, tensor: Tensor, shape: _Shape, like: Tensor) -> None:
    if tensor.shape != shape:
        _refuse(ValueError, name, tensor, f"shape {shape}")
    if tensor.dtype not in _DTYPES:
        _refuse(TypeError, name, tensor, f"one of {_DTYPE_NAMES}")
    _check_place(name, tensor, like)


def _check_exact(name: str, tensor: Tensor, shape: _Shape, dtype, like: Tensor) -> None:
    """Check a tensor that the forward returned: shape, dtype and device are fixed."""
    if tensor.dtype != dtype:
        _refuse(TypeError, name, tensor, f"{dtype}, as the forward returned it")
    if tensor.shape != shape:
        _refuse(ValueError, name, tensor, f"shape {shape}, as the forward returned it")
    _check_place(name, tensor, like)


def _check_index(name: str, index: Tensor, length: int | None, like: Tensor) -> None:
    if index.dtype != torch.int32:
        _refuse(TypeError, name, index, "torch.int32")
    if index.dim() != 1 or (length is not None and index.shape[0] != length):
        _refuse(ValueError, name, index, f"shape [{'N' if length is None else length}]")
    _check_place(name, index, like)


def _check_selection(
    op, hidden: Tensor, rows: _Index, weight_ids: _Index, sets: int, traced
) -> int:
    """Check ``rows`` and ``weight_ids``; return N, the number of entries.

    ``sets`` is S, the number of weight sets. Values are not checked if ``traced`` is true.
    """
    count = hidden.shape[0]
    values = not traced and hidden.device.type == "cpu"
    asserted = not traced and hidden.device.type == "cuda"
    if rows is not None:
        _check_index(f"{op}: rows", rows, None, hidden)
        if values:
            check_row_values(rows, count, f"{op}: rows")
        elif asserted:
            assert_range(f"{op}: rows", rows, -1, count)
        count = rows.shape[0]
    if weight_ids is not None:
        _check_index(f"{op}: weight_ids", weight_ids, count, hidden)
        if values:
            check_weight_id_values(weight_ids, sets, f"{op}: weight_ids")
        elif asserted:
            assert_range(f"{op}: weight_ids", weight_ids, 0, sets)
    return count


def _check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        expected = f"expected one of {', '.join(ACTIVATIONS)}"
        raise ValueError(f"{op}: activation: got {activation!r}, {expected}")


def _check_write(op: str, hidden: Tensor, write: Tensor, weight_ids: Tensor | None) -> None:
    d = hidden.shape[1]
    if weight_ids is None:
        if write.dim() != 2 or write.shape[1] != d:
            _refuse(ValueError, f"{op}: write", write, f"[r, {d}] (no weight_ids)")
    elif write.dim() != 3 or write.shape[2] != d or write.shape[0] < 1:
        _refuse(ValueError, f"{op}: write", write, f"[S, r, {d}] (with weight_ids)")
    if not 1 <= write.shape[-2] <= MAX_RANK:
        _refuse(ValueError, f"{op}: write", write, f"rank 1 <= r <= {MAX_RANK}")
    _check_float(f"{op}: write", write, write.shape, hidden)


def _is_plain(
    hidden: Tensor,
    rows: _Index,
    others: tuple[Tensor | None, ...],
    shapes: tuple[_Shape | None, ...],
) -> bool:
    """Return whether a call certainly passes the checks that the other functions make one by one.

    This is the case of nearly every call: ``hidden`` is a contiguous matrix, ``rows`` is known to
    be valid, and the floating-point arguments ``others`` have the expected shapes, lie on the
    device of ``hidden`` and apart from its memory.
    """
    if (
        hidden.layout is not torch.strided
        or hidden.dtype not in _DTYPES
        or hidden.dim() != 2
        or not hidden.is_contiguous()
        or hidden.shape[1] < 1
    ):
        return False
    device, begin = hidden.device, hidden.data_ptr()
    end = begin + hidden.nbytes
    if rows is not None:
        if (
            rows.dtype is not torch.int32
            or rows.dim() != 1
            or rows.device != device
            or not are_rows_known(rows, hidden.shape[0])
        ):
            return False
        start = rows.data_ptr()
        if start < end and start + rows.nbytes > begin:
            return False
    for tensor, shape in zip(others, shapes):  # noqa: B905  (same length, and on the hot path)
        if tensor is None:
            continue
        if (
            tensor.shape != shape
            or tensor.dtype not in _DTYPES
            or tensor.layout is not torch.strided
            or tensor.device != device
        ):
            return False
        start = tensor.data_ptr()
        if start < end and start + tensor.nbytes > begin:
            return False
    return True


def as_built(weights: EditWeights) -> EditWeights:
    """Return ``weights`` as :class:`BuiltWeights` if they can be used without further checks."""
    write, shape = weights.write, weights.write.shape
    if not 2 <= len(shape) <= 3 or not 1 <= shape[-2] <= MAX_RANK:
        return weights
    if weights.subtract_bias is not None and not weights.subtract_projection:
        return weights
    expected = (shape, shape[:-1], shape, shape[:-1])
    for tensor, size in zip(weights[:4], expected, strict=True):
        if tensor is not None and (
            tensor.shape != size
            or tensor.dtype not in _DTYPES
            or tensor.layout is not torch.strided
            or tensor.device != write.device
        ):
            return weights
    return BuiltWeights(*weights)


def is_checked(hidden: Tensor, weights: EditWeights, rows: _Index, weight_ids: _Index) -> bool:
    """Return whether an edit without ``coeff`` needs no checks of its arguments.

    This is so if ``weights`` are :class:`BuiltWeights` that fit ``hidden``, and the values of
    ``rows`` are known to be valid.
    """
    return (
        type(weights) is BuiltWeights
        and rows is not None
        and weight_ids is None
        and weights.write.dim() == 2
        and hidden.shape[-1] == weights.write.shape[1]
        and hidden.dtype in _DTYPES
        and (device := hidden.device) == weights.write.device
        and device == rows.device
        and are_rows_known(rows, hidden.numel() // hidden.shape[-1])
    )


def _check_edit(op: str, in_place: bool) -> Callable[..., None]:
    def check(
        hidden,
        rows,
        weight_ids,
        read,
        read_bias,
        write,
        subtract_bias,
        coeff,
        subtract_projection,
        activation,
        save,
        *,
        traced=False,
    ):
        shape = write.shape
        if (
            weight_ids is None
            and not traced
            and activation in ACTIVATIONS
            and len(shape) == 2
            and shape[1] == hidden.shape[-1]
            and 1 <= shape[0] <= MAX_RANK
            and (subtract_bias is None or subtract_projection)
        ):
            vector = shape[:1]
            coeff_shape = None
            if coeff is not None:
                coeff_shape = (hidden.shape[0] if rows is None else rows.shape[0], shape[0])
            if _is_plain(
                hidden,
                rows,
                (read, read_bias, write, subtract_bias, coeff),
                (shape, vector, shape, vector, coeff_shape),
            ):
                return
        _check_hidden(f"{op}: hidden", hidden, in_place and not traced)
        _check_activation(op, activation)
        _check_write(op, hidden, write, weight_ids)
        if read is not None:
            _check_float(f"{op}: read", read, shape, hidden)
        if read_bias is not None:
            _check_float(f"{op}: read_bias", read_bias, shape[:-1], hidden)
        if subtract_bias is not None:
            if not subtract_projection:
                _refuse(
                    ValueError,
                    f"{op}: subtract_bias",
                    subtract_bias,
                    "None without subtract_projection",
                )
            _check_float(f"{op}: subtract_bias", subtract_bias, shape[:-1], hidden)
        count = _check_selection(op, hidden, rows, weight_ids, shape[0], traced)
        if coeff is not None:
            _check_float(f"{op}: coeff", coeff, (count, shape[-2]), hidden)
        if in_place and not traced:
            _check_apart(
                op,
                hidden,
                rows=rows,
                weight_ids=weight_ids,
                read=read,
                read_bias=read_bias,
                write=write,
                subtract_bias=subtract_bias,
                coeff=coeff,
            )

    return check


def _check_edit_backward(op: str, in_place: bool) -> Callable[..., None]:
    def check(
        grad,
        saved_input,
        u,
        z,
        rows,
        weight_ids,
        read,
        write,
        coeff,
        subtract_projection,
        activation,
        *needs,
        traced=False,
    ):
        _check_hidden(f"{op}: grad", grad, in_place and not traced)
        _check_activation(op, activation)
        _check_write(op, grad, write, weight_ids)
        if read is not None:
            _check_float(f"{op}: read", read, write.shape, grad)
        count = _check_selection(op, grad, rows, weight_ids, write.shape[0], traced)
        small, acc = (count, write.shape[-2]), accumulation_dtype(grad.dtype)
        if coeff is not None:
            _check_float(f"{op}: coeff", coeff, small, grad)
        _check_exact(f"{op}: saved_input", saved_input, (count, grad.shape[1]), grad.dtype, grad)
        _check_exact(f"{op}: u", u, small, acc, grad)
        _check_exact(f"{op}: z", z, (0,) if activation == "linear" else small, acc, grad)
        if in_place and not traced:
            _check_apart(
                op,
                grad,
                saved_input=saved_input,
                u=u,
                z=z,
                rows=rows,
                weight_ids=weight_ids,
                read=read,
                write=write,
                coeff=coeff,
            )

    return check


def _check_scale(op: str, hidden: Tensor, scale: Tensor, weight_ids: Tensor | None) -> None:
    d = hidden.shape[1]
    if weight_ids is not None and (scale.dim() != 2 or scale.shape[0] < 1):
        _refuse(ValueError, f"{op}: scale", scale, f"[S, {d}] (with weight_ids)")
    _check_float(f"{op}: scale", scale, (d,) if weight_ids is None else (scale.shape[0], d), hidden)


def _check_red(op: str, in_place: bool) -> Callable[..., None]:
    def check(hidden, rows, weight_ids, scale, bias, save, *, traced=False):
        _check_hidden(f"{op}: hidden", hidden, in_place and not traced)
        _check_scale(op, hidden, scale, weight_ids)
        _check_float(f"{op}: bias", bias, scale.shape, hidden)
        _check_selection(op, hidden, rows, weight_ids, scale.shape[0], traced)
        if in_place and not traced:
            _check_apart(op, hidden, rows=rows, weight_ids=weight_ids, scale=scale, bias=bias)

    return check


def _check_red_backward(op: str, in_place: bool) -> Callable[..., None]:
    def check(grad, saved_input, rows, weight_ids, scale, *needs, traced=False):
        _check_hidden(f"{op}: grad", grad, in_place and not traced)
        _check_scale(op, grad, scale, weight_ids)
        count = _check_selection(op, grad, rows, weight_ids, scale.shape[0], traced)
        _check_exact(f"{op}: saved_input", saved_input, (count, grad.shape[1]), grad.dtype, grad)
        if in_place and not traced:
            _check_apart(
                op, grad, saved_input=saved_input, rows=rows, weight_ids=weight_ids, scale=scale
            )

    return check


def _check_map(op: str, X: Tensor, signs: Tensor | None, base: Tensor | None) -> None:
    if X.dtype not in _DTYPES:
        _refuse(TypeError, f"{op}: X", X, f"one of {_DTYPE_NAMES}")
    _check_place(f"{op}: X", X, X)
    if X.dim() != 3 or not 1 <= X.shape[2] <= MAX_RANK or X.shape[2] > X.shape[1]:
        _refuse(ValueError, f"{op}: X", X, f"[L, d, r] with 1 <= r <= min(d, {MAX_RANK})")
    if signs is not None:
        _check_float(f"{op}: signs", signs, (X.shape[0], X.shape[2]), X)
    if base is not None:
        _check_float(f"{op}: base", base, X.shape, X)


def _check_build(op: str) -> Callable[..., None]:
    def check(X, signs, base, base_point, W, *, traced=False):
        _check_map(op, X, signs, base)
        layers, d, r = X.shape
        if (base is None) != (base_point is None):
            _refuse(ValueError, f"{op}: base_point", base_point, "[L, r, d] with base, else None")
        if base_point is not None:
            _check_float(f"{op}: base_point", base_point, (layers, r, d), X)
        if W is not None:
            _check_float(f"{op}: W", W, (layers, r, d), X)

    return check


def _check_build_backward(op: str) -> Callable[..., None]:
    def check(grad_R, grad_D, X, signs, base, aux, *, traced=False):
        _check_map(op, X, signs, base)
        layers, d, r = X.shape
        for name, grad in (("grad_R", grad_R), ("grad_D", grad_D)):
            if grad is not None:
                _check_float(f"{op}: {name}", grad, (layers, r, d), X)
        shape = (layers, 1 if base is None else 2, r, r)
        _check_exact(f"{op}: aux", aux, shape, accumulation_dtype(X.dtype), X)

    return check


CHECKS: dict[str, Callable[..., None]] = {
    "edit": _check_edit("edit", False),
    "edit_": _check_edit("edit_", True),
    "edit_backward": _check_edit_backward("edit_backward", False),
    "edit_backward_": _check_edit_backward("edit_backward_", True),
    "red": _check_red("red", False),
    "red_": _check_red("red_", True),
    "red_backward": _check_red_backward("red_backward", False),
    "red_backward_": _check_red_backward("red_backward_", True),
    "householder": _check_build("householder"),
    "householder_backward": _check_build_backward("householder_backward"),
    "cayley": _check_build("cayley"),
    "cayley_backward": _check_build_backward("cayley_backward"),
}
"""Argument checks by operator name; with ``traced=True`` they do not check values or memory."""


def _required(schema: str) -> list[tuple[int, str]]:
    """Return the index and name of each tensor argument that is not optional in a schema."""
    arguments = [text.split(" ") for text in schema[1 : schema.index(") ->")].split(", ")]
    return [
        (i, name) for i, (kind, name) in enumerate(arguments) if kind in ("Tensor", "Tensor(a!)")
    ]


def checked(name: str, implementation: Callable, backend: Callable) -> Callable:
    """Return a function that checks an operator's arguments and runs it on a backend."""
    check = CHECKS[name]

    def call(*args):
        check(*args)
        return implementation(backend, *args)

    return call


def guarded(name: str, schema: str, function: Callable, *, traced: bool = False) -> Callable:
    """Return a function that checks its arguments and then calls ``function``.

    It also rejects None for required tensors, which PyTorch's dispatcher accepts.

    Args:
        name: The operator's name.
        schema: The operator's schema.
        function: An implementation or a fake of the operator.
        traced: Whether to check only shapes, dtypes and devices, as a fake must.
    """
    check, required = CHECKS[name], _required(schema)
    options = {"traced": True} if traced else {}

    def implementation(*args):
        for i, argument in required:
            if args[i] is None:
                _refuse(TypeError, f"{name}: {argument}", None, "a tensor")
        check(*args, **options)
        return function(*args)

    return implementation
