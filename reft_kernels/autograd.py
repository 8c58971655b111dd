"""Autograd functions of the edits.

These functions run once per layer and forward pass. They test flags inline and call few helpers,
because Python function calls dominate the time of a small edit on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reft_kernels import dispatch, host_calls, ops, ownership
from reft_kernels.arguments import BuiltWeights, EditWeights, RedWeights, RowSelection
from reft_kernels.checks import check_writable, is_marked, num_rows_of
from reft_kernels.operator_checks import is_checked

_edit, _edit_ = torch.ops.reft_kernels.edit.default, torch.ops.reft_kernels.edit_.default
_edit_backward = torch.ops.reft_kernels.edit_backward.default
_edit_backward_ = torch.ops.reft_kernels.edit_backward_.default
_red, _red_ = torch.ops.reft_kernels.red.default, torch.ops.reft_kernels.red_.default
_red_backward = torch.ops.reft_kernels.red_backward.default
_red_backward_ = torch.ops.reft_kernels.red_backward_.default


def _as_rows(tensor: Tensor) -> Tensor:
    """Return ``[..., d]`` as ``[M, d]``: a view if the strides allow it, else a copy."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Return an operator's output ``[M, d]`` in the shape of ``like``.

    Autograd does not record the result as a view, so that it can be edited in place.
    """
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view(rows, like.shape)


def _has_row_stride(tensor: Tensor) -> bool:
    """Return whether ``[..., d]`` can be viewed as ``[M, d]``.

    This is computed from sizes and strides, because a traced tensor has no data pointer.
    """
    if tensor.dim() <= 2 or tensor.is_contiguous():
        return True
    rows = [
        (size, stride)
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        if size != 1
    ]
    return all(
        outer == size * stride for (_, outer), (size, stride) in zip(rows, rows[1:], strict=False)
    )


def _edit_rows_of(hidden: Tensor, in_place_op, *args):
    """Run an in-place operator on the rows of ``hidden``.

    Goes through a copy if the strides of ``hidden`` do not allow a view as rows.
    """
    if hidden.is_contiguous():
        return in_place_op(
            hidden if hidden.dim() == 2 else hidden.view(-1, hidden.shape[-1]), *args
        )
    flat = _as_rows(hidden)
    result = in_place_op(flat, *args)
    if not _has_row_stride(hidden):
        hidden.copy_(flat.view(hidden.shape))
    return result


def _edit_without_graph(hidden: Tensor, in_place_op, *args) -> Tensor:
    """Edit ``hidden`` in place without recording the edit for autograd.

    The version counter is incremented here, because the kernels do not do so. Autograd uses it to
    detect that a saved tensor was modified.
    """
    _edit_rows_of(hidden, in_place_op, *args)
    if not (torch.compiler.is_compiling() or hidden.is_inference()):
        torch.autograd.graph.increment_version(hidden)
    return hidden


def _to(grad: Tensor, dtype: torch.dtype | None, wanted: bool) -> Tensor | None:
    if not wanted or dtype is None:
        return None
    return grad if grad.dtype is dtype else grad.to(dtype)


def _applied(function: type[torch.autograd.Function]) -> Callable:
    """Return ``function.apply`` without its support for functorch's transforms.

    ``Function.apply`` is used where a transform is active or the call is traced.
    """
    apply = function.apply
    direct = super(torch.autograd.Function, function).apply  # type: ignore[misc]  # defined in C++

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return apply(*args)
        return direct(*args)

    return call


class _Edit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
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
        inplace,
        checked,
        rounded,
    ):
        # The backward computes with the weights as they are
        used_read, used_write = (read, write) if rounded is None else rounded
        args = (
            rows,
            weight_ids,
            used_read,
            read_bias,
            used_write,
            subtract_bias,
            coeff,
            subtract_projection,
            activation,
            True,
        )
        if inplace:
            edit_ = ops.direct("edit_", hidden, checked) or _edit_
            saved_input, u, z = _edit_rows_of(hidden, edit_, *args)
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            edit = ops.direct("edit", hidden, checked) or _edit
            out, saved_input, u, z = edit(_as_rows(hidden), *args)
            out = _shaped(out, hidden)
        # without rows the backward recomputes the input from the output, which saves memory
        ctx.save_for_backward(
            out if rows is None else saved_input, u, z, rows, weight_ids, read, write, coeff
        )
        ctx.settings = (subtract_projection, activation)
        ctx.read_bias_dtype = None if read_bias is None else read_bias.dtype
        ctx.subtract_bias_dtype = None if subtract_bias is None else subtract_bias.dtype
        return out

    @staticmethod
    @ownership.once_differentiable
    def backward(ctx, grad):
        may_overwrite = not torch.compiler.is_compiling() and ownership.is_sole_owner(grad)
        saved_input, u, z, rows, weight_ids, read, write, coeff = ctx.saved_tensors
        subtract_projection, activation = ctx.settings
        needs = ctx.needs_input_grad
        need_weights = needs[3] or needs[4] or needs[5] or needs[6]
        args = (
            _as_rows(saved_input),
            u,
            z,
            rows,
            weight_ids,
            read,
            write,
            coeff,
            subtract_projection,
            activation,
        )
        if needs[0] and may_overwrite:
            edit_backward_ = ops.direct("edit_backward_", grad) or _edit_backward_
            grads = _edit_rows_of(grad, edit_backward_, *args, need_weights)
            grad_hidden = grad
        else:
            edit_backward = ops.direct("edit_backward", grad) or _edit_backward
            grad_hidden, *grads = edit_backward(_as_rows(grad), *args, needs[0], need_weights)
            grad_hidden = _shaped(grad_hidden, grad) if needs[0] else None
        grad_read, grad_read_bias, grad_write, grad_subtract_bias, grad_coeff = grads
        return (
            grad_hidden,
            None,
            None,
            _to(grad_read, None if read is None else read.dtype, needs[3]),
            _to(grad_read_bias, ctx.read_bias_dtype, needs[4]),
            _to(grad_write, write.dtype, needs[5]),
            _to(grad_subtract_bias, ctx.subtract_bias_dtype, needs[6]),
            _to(grad_coeff, None if coeff is None else coeff.dtype, needs[7]),
            None,
            None,
            None,
            None,
            None,
        )


class _Red(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rows, weight_ids, scale, bias, inplace):
        args = (rows, weight_ids, scale, bias, True)
        if inplace:
            saved_input = _edit_rows_of(hidden, ops.direct("red_", hidden) or _red_, *args)
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            red = ops.direct("red", hidden) or _red
            out, saved_input = red(_as_rows(hidden), *args)
            out = _shaped(out, hidden)
            saved_input = hidden if rows is None else saved_input
        ctx.save_for_backward(saved_input, rows, weight_ids, scale)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @ownership.once_differentiable
    def backward(ctx, grad):
        may_overwrite = not torch.compiler.is_compiling() and ownership.is_sole_owner(grad)
        saved_input, rows, weight_ids, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_weights = needs[3] or needs[4]
        args = (_as_rows(saved_input), rows, weight_ids, scale)
        if needs[0] and may_overwrite:
            red_backward_ = ops.direct("red_backward_", grad) or _red_backward_
            grad_scale, grad_bias = _edit_rows_of(grad, red_backward_, *args, need_weights)
            grad_hidden = grad
        else:
            red_backward = ops.direct("red_backward", grad) or _red_backward
            grad_hidden, grad_scale, grad_bias = red_backward(
                _as_rows(grad), *args, needs[0], need_weights
            )
            grad_hidden = _shaped(grad_hidden, grad) if needs[0] else None
        grad_scale, grad_bias = (
            _to(grad_scale, scale.dtype, needs[3]),
            _to(grad_bias, ctx.bias_dtype, needs[4]),
        )
        return grad_hidden, None, None, grad_scale, grad_bias, None


_apply_edit, _apply_red = _applied(_Edit), _applied(_Red)


def operators_check(hidden: Tensor, rows: Tensor | None, weight_ids: Tensor | None) -> bool:
    """Return whether the operators check every argument of a call, so that the caller need not.

    They do so on the CPU. On a GPU they do not check that the values of ``rows`` are distinct,
    because that would synchronize; here they need not if ``rows`` is marked as checked. While a
    compiler traces there are no values.
    """
    if not isinstance(hidden, Tensor) or torch.compiler.is_compiling():
        return False
    if hidden.is_cpu:
        return True
    if weight_ids is not None or hidden.dim() < 1 or hidden.shape[-1] < 1:
        return False
    return rows is None or (isinstance(rows, Tensor) and is_marked(rows, num_rows_of(hidden)))


def _copied_back(hidden: Tensor, out: Tensor) -> Tensor:
    """Copy the result of an out-of-place edit to ``hidden``, for traced in-place edits.

    Functionalization removes the copy unless ``hidden`` is a graph input. An in-place Function is
    not used, because Dynamo (torch 2.13) loses the gradient of a graph input that a Function marks
    as dirty.
    """
    return hidden.copy_(out)


def _rounded(hidden: Tensor, weights: EditWeights) -> tuple[Tensor | None, Tensor] | None:
    """Return the bf16 copies of the matrices that the forward pass uses instead, or None."""
    if (
        hidden.dtype is not torch.bfloat16
        or type(weights) is not BuiltWeights
        or weights.rounded is None
        or (hidden.is_cpu and dispatch.serves_cpu_natively)
        or torch.compiler.is_compiling()
        or not dispatch.is_launched("edit", hidden)
    ):
        return None
    matrices, layer = weights.rounded
    return matrices.layer(layer)


def apply_edit(
    hidden: Tensor, weights: EditWeights, chosen: RowSelection, activation: str, inplace: bool
) -> Tensor:
    """Apply a low-rank edit and record it for autograd if an argument requires grad.

    Args:
        hidden: ``[..., d]``.
        weights: The weights of the edit.
        chosen: The rows, weight sets and coefficients.
        activation: Canonical activation name.
        inplace: Whether to edit ``hidden`` itself.

    Returns:
        The edited hidden states, with the shape and dtype of ``hidden``.

    Raises:
        ValueError: If ``inplace`` is true and ``hidden`` cannot be edited in place.
    """
    rounded = _rounded(hidden, weights)
    if host_calls.apply_edit is not None and not torch.compiler.is_compiling():
        out = host_calls.apply_edit(hidden, weights, chosen, activation, inplace, rounded)
        if out is not None:
            return out
    read, read_bias, write, subtract_bias, subtract_projection = weights
    rows, weight_ids, coeff = chosen
    args = (
        rows,
        weight_ids,
        read,
        read_bias,
        write,
        subtract_bias,
        coeff,
        subtract_projection,
        activation,
    )
    # a compiler checks while it traces, and the cpu backend in C++
    checked = (
        coeff is None
        and type(weights) is BuiltWeights
        and not (hidden.is_cpu and dispatch.serves_cpu_natively)
        and not torch.compiler.is_compiling()
        and is_checked(hidden, weights, rows, weight_ids)
    )
    graph = torch.is_grad_enabled() and (
        hidden.requires_grad
        or write.requires_grad
        or (read is not None and read.requires_grad)
        or (read_bias is not None and read_bias.requires_grad)
        or (subtract_bias is not None and subtract_bias.requires_grad)
        or (coeff is not None and coeff.requires_grad)
    )
    # inlined conditions under which check_writable may raise
    if (
        inplace
        and not torch.compiler.is_compiling()
        and (not hidden.is_contiguous() or (graph and (hidden.is_leaf or hidden._is_view())))
    ):
        check_writable(hidden, graph)
    if graph:
        if inplace and torch.compiler.is_compiling():
            return _copied_back(hidden, _Edit.apply(hidden, *args, False, False, None))
        if ownership.baseline is None:
            ownership.calibrate()
        return _apply_edit(hidden, *args, inplace, checked, rounded)
    if rounded is not None:
        args = (*args[:2], rounded[0], read_bias, rounded[1], *args[5:])
    if inplace:
        edit_ = ops.direct("edit_", hidden, checked) or _edit_
        return _edit_without_graph(hidden, edit_, *args, False)
    edit = ops.direct("edit", hidden, checked) or _edit
    return edit(_as_rows(hidden), *args, False)[0].view(hidden.shape)


def apply_red(hidden: Tensor, weights: RedWeights, chosen: RowSelection, inplace: bool) -> Tensor:
    """Apply RED and record it for autograd if an argument requires grad.

    Args:
        hidden: ``[..., d]``.
        weights: The weights of RED.
        chosen: The rows and weight sets; ``coeff`` is ignored.
        inplace: Whether to edit ``hidden`` itself.

    Returns:
        The edited hidden states, with the shape and dtype of ``hidden``.

    Raises:
        ValueError: If ``inplace`` is true and ``hidden`` cannot be edited in place.
    """
    (scale, bias), (rows, weight_ids, _) = weights, chosen
    graph = torch.is_grad_enabled() and (
        hidden.requires_grad or scale.requires_grad or bias.requires_grad
    )
    # inlined conditions under which check_writable may raise
    if (
        inplace
        and not torch.compiler.is_compiling()
        and (not hidden.is_contiguous() or (graph and (hidden.is_leaf or hidden._is_view())))
    ):
        check_writable(hidden, graph)
    if graph:
        if inplace and torch.compiler.is_compiling():
            # without rows RED saves its input for the backward, and the copy overwrites it
            saved_input = hidden.clone() if rows is None else hidden
            return _copied_back(
                hidden, _Red.apply(saved_input, rows, weight_ids, scale, bias, False)
            )
        if ownership.baseline is None:
            ownership.calibrate()
        return _apply_red(hidden, rows, weight_ids, scale, bias, inplace)
    if inplace:
        red_ = ops.direct("red_", hidden) or _red_
        return _edit_without_graph(hidden, red_, rows, weight_ids, scale, bias, False)
    red = ops.direct("red", hidden) or _red
    return red(_as_rows(hidden), rows, weight_ids, scale, bias, False)[0].view(hidden.shape)
