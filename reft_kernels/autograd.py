"""The autograd functions of the edits, outside the operators: what is saved, what is edited in
place, what is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reft_kernels import (
    ops,  # noqa: F401  (declares the operators)
    ownership,
)
from reft_kernels.checks import check_writable

_op = torch.ops.reft_kernels


def _as_rows(tensor: Tensor) -> Tensor:
    """``[..., d]`` as ``[M, d]``; a copy only where no single row stride exists."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """An operator's ``[M, d]`` output in ``like``'s shape; no view to autograd, so that the
    caller may edit it in place.
    """
    return rows if like.dim() == 2 else torch.ops.aten._unsafe_view(rows, like.shape)


def _has_row_stride(tensor: Tensor) -> bool:
    """Whether ``[..., d]`` is viewable as ``[M, d]``, from its metadata alone (a traced tensor
    has no address to compare).
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
    """Run an in-place operator on ``hidden`` as rows, through a copy where its strides do not
    allow a view.
    """
    flat = _as_rows(hidden)
    result = in_place_op(flat, *args)
    if not _has_row_stride(hidden):
        hidden.copy_(flat.view(hidden.shape))
    return result


def _edit_without_graph(hidden: Tensor, in_place_op, *args) -> Tensor:
    """An in-place edit that no graph records, but that other graphs see as a change: kernels do
    not count versions.
    """
    _edit_rows_of(hidden, in_place_op, *args)
    if not (torch.compiler.is_compiling() or hidden.is_inference()):
        torch.autograd.graph.increment_version(hidden)
    return hidden


def _to(grad: Tensor | None, dtype: torch.dtype | None, wanted: bool) -> Tensor | None:
    return grad.to(dtype) if wanted and grad is not None else None


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
    ):
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
            True,
        )
        if inplace:
            saved_input, u, z = _edit_rows_of(hidden, _op.edit_, *args)
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out, saved_input, u, z = _op.edit(_as_rows(hidden), *args)
            out = _shaped(out, hidden)
        # over all rows the backward rebuilds the input from the output, which the next layer keeps
        # anyway
        ctx.save_for_backward(
            out if rows is None else saved_input, u, z, rows, weight_ids, read, write, coeff
        )
        ctx.settings = (subtract_projection, activation)
        ctx.bias_dtypes = tuple(None if t is None else t.dtype for t in (read_bias, subtract_bias))
        return out

    @staticmethod
    @once_differentiable
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
            grads = _edit_rows_of(grad, _op.edit_backward_, *args, need_weights)
            grad_hidden = grad
        else:
            grad_hidden, *grads = _op.edit_backward(_as_rows(grad), *args, needs[0], need_weights)
            grad_hidden = _shaped(grad_hidden, grad) if needs[0] else None
        grad_read, grad_read_bias, grad_write, grad_subtract_bias, grad_coeff = grads
        return (
            grad_hidden,
            None,
            None,
            _to(grad_read, None if read is None else read.dtype, needs[3]),
            _to(grad_read_bias, ctx.bias_dtypes[0], needs[4]),
            _to(grad_write, write.dtype, needs[5]),
            _to(grad_subtract_bias, ctx.bias_dtypes[1], needs[6]),
            _to(grad_coeff, None if coeff is None else coeff.dtype, needs[7]),
            None,
            None,
            None,
        )


class _Red(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rows, weight_ids, scale, bias, inplace):
        args = (rows, weight_ids, scale, bias, True)
        if inplace:
            saved_input = _edit_rows_of(hidden, _op.red_, *args)
            ctx.mark_dirty(hidden)
            out = hidden
        else:
            out, saved_input = _op.red(_as_rows(hidden), *args)
            out = _shaped(out, hidden)
            saved_input = hidden if rows is None else saved_input
        ctx.save_for_backward(saved_input, rows, weight_ids, scale)
        ctx.bias_dtype = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        may_overwrite = not torch.compiler.is_compiling() and ownership.is_sole_owner(grad)
        saved_input, rows, weight_ids, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_weights = needs[3] or needs[4]
        args = (_as_rows(saved_input), rows, weight_ids, scale)
        if needs[0] and may_overwrite:
            grad_scale, grad_bias = _edit_rows_of(grad, _op.red_backward_, *args, need_weights)
            grad_hidden = grad
        else:
            grad_hidden, grad_scale, grad_bias = _op.red_backward(
                _as_rows(grad), *args, needs[0], need_weights
            )
            grad_hidden = _shaped(grad_hidden, grad) if needs[0] else None
        grad_scale, grad_bias = (
            _to(grad_scale, scale.dtype, needs[3]),
            _to(grad_bias, ctx.bias_dtype, needs[4]),
        )
        return grad_hidden, None, None, grad_scale, grad_bias, None


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _copied_back(hidden: Tensor, out: Tensor) -> Tensor:
    """The in-place edit as a compiler traces it: functionalization removes the copy, except where
    ``hidden`` is a graph input.

    Dynamo returns a graph input that a Function marked dirty as it came in, and so without its
    gradient (torch 2.13).
    """
    return hidden.copy_(out)


def apply_edit(
    hidden: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    subtract_bias: Tensor | None,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    inplace: bool,
) -> Tensor:
    """The general edit with its gradient; arguments as the operator ``reft_kernels::edit``,
    already checked.
    """
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
    graph = _needs_graph(hidden, read, read_bias, write, subtract_bias, coeff)
    if inplace:
        check_writable(hidden, graph)
    if graph:
        if inplace and torch.compiler.is_compiling():
            return _copied_back(hidden, _Edit.apply(hidden, *args, False))
        ownership.calibrate()
        return _Edit.apply(hidden, *args, inplace)
    if inplace:
        return _edit_without_graph(hidden, _op.edit_, *args, False)
    return _op.edit(_as_rows(hidden), *args, False)[0].view(hidden.shape)


def apply_red(
    hidden: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    inplace: bool,
) -> Tensor:
    """RED with its gradient; arguments already checked."""
    graph = _needs_graph(hidden, scale, bias)
    if inplace:
        check_writable(hidden, graph)
    if graph:
        if inplace and torch.compiler.is_compiling():
            saved_input = (
                hidden.clone() if rows is None else hidden
            )  # over all rows RED keeps its input, which the copy overwrites
            return _copied_back(
                hidden, _Red.apply(saved_input, rows, weight_ids, scale, bias, False)
            )
        ownership.calibrate()
        return _Red.apply(hidden, rows, weight_ids, scale, bias, inplace)
    if inplace:
        return _edit_without_graph(hidden, _op.red_, rows, weight_ids, scale, bias, False)
    return _op.red(_as_rows(hidden), rows, weight_ids, scale, bias, False)[0].view(hidden.shape)
