"""All operators in PyTorch: the ``torch`` backend, and in fp64 the reference for tests.

Each function implements the operator of the same name in :mod:`reft_kernels.ops`. ``source`` and
``out`` may be the same tensor. Sums are accumulated in fp32, or in fp64 for fp64 hidden states.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.activations import activate, activation_derivative
from reft_kernels.dtypes import accumulation_dtype
from reft_kernels.orthonormal import cayley, cayley_backward, householder, householder_backward

__all__ = [
    "edit",
    "edit_backward",
    "red",
    "red_backward",
    "householder",
    "householder_backward",
    "cayley",
    "cayley_backward",
]


def _no_autocast(tensor: Tensor):
    """Return a context that disables autocast: the operators determine their dtypes themselves."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


class _Selection(NamedTuple):
    """Row numbers in which every skipped entry is replaced by the first valid entry.

    Duplicate entries of a row then write the same values to it.
    """

    rows: Tensor | None  # int64 [N], all in range; None selects all rows
    order: Tensor | None  # int64 [N]: entry n is a copy of entry order[n]; None if none is skipped
    valid: Tensor | None  # bool [N, 1], false for skipped entries; None if none is skipped

    def take(self, per_row: Tensor) -> Tensor:
        """Return a per-row tensor ``[N, ...]`` with skipped entries replaced likewise."""
        return per_row if self.order is None else per_row.index_select(0, self.order)

    def take_optional(self, per_row: Tensor | None) -> Tensor | None:
        """Apply :meth:`take` unless ``per_row`` is None."""
        return None if per_row is None else self.take(per_row)

    def mask(self, per_row: Tensor) -> Tensor:
        """Return a per-row tensor ``[N, k]`` with zeros in skipped entries."""
        return (
            per_row
            if self.valid is None
            else torch.where(self.valid, per_row, torch.zeros_like(per_row))
        )


def _select(rows: Tensor | None) -> _Selection:
    if rows is None:
        return _Selection(None, None, None)
    if rows.device.type == "cpu" and (rows.numel() == 0 or int(rows.min()) >= 0):
        return _Selection(rows.long(), None, None)
    valid = rows >= 0
    entries = torch.arange(rows.shape[0], device=rows.device)
    first = valid.to(torch.int8).argmax() if rows.shape[0] else entries.new_zeros(())
    order = torch.where(valid, entries, first)
    return _Selection(rows.index_select(0, order).clamp(min=0).long(), order, valid.unsqueeze(1))


def _take(source: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows ``[N, d]`` of ``source [M, d]``."""
    if rows is not None and source.shape[0] == 0:
        return source.new_zeros((rows.shape[0], source.shape[1]))  # all entries are skipped
    return source if rows is None else source.index_select(0, rows)


def _scatter(
    out: Tensor, rows: Tensor | None, values: Tensor, all_skipped: Tensor | None, original: Tensor
) -> None:
    """Write ``values [N, d]`` to the rows of ``out [M, d]``.

    ``all_skipped`` is a boolean scalar tensor or None. If it is true, ``original`` is written
    instead, which leaves ``out`` unchanged.
    """
    if all_skipped is not None:
        values = torch.where(all_skipped, original, values)
    if rows is None:
        out.copy_(values)
    elif out.shape[0]:
        out.index_copy_(0, rows, values.to(out.dtype))


def _all_skipped(selection: _Selection) -> Tensor | None:
    return None if selection.valid is None else ~selection.valid.any()


def _project(x: Tensor, weight: Tensor, weight_ids: Tensor | None) -> Tensor:
    """Return x weight^T ``[N, r]``; with ``weight_ids``, each row uses the weight of its set."""
    if weight_ids is None:
        return x @ weight.to(x.dtype).mT
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    for s in range(weight.shape[0]):
        out = torch.where((weight_ids == s).unsqueeze(1), x @ weight[s].to(x.dtype).mT, out)
    return out


def _expand(v: Tensor, weight: Tensor, weight_ids: Tensor | None) -> Tensor:
    """Return v weight ``[N, d]``; with ``weight_ids``, each row uses the weight of its set."""
    if weight_ids is None:
        return v @ weight.to(v.dtype)
    out = v.new_zeros((v.shape[0], weight.shape[2]))
    for s in range(weight.shape[0]):
        out = torch.where((weight_ids == s).unsqueeze(1), v @ weight[s].to(v.dtype), out)
    return out


def _outer(v: Tensor, x: Tensor, weight_ids: Tensor | None, sets: int) -> Tensor:
    """Return sum_n v_n x_n^T ``[r, d]``; with ``weight_ids``, one sum per set ``[S, r, d]``."""
    if weight_ids is None:
        return v.mT @ x
    members = [(weight_ids == s).unsqueeze(1) for s in range(sets)]
    return torch.stack([torch.where(m, v, torch.zeros_like(v)).mT @ x for m in members])


def _row_sum(v: Tensor, weight_ids: Tensor | None, sets: int) -> Tensor:
    """Return sum_n v_n ``[r]``; with ``weight_ids``, one sum per set ``[S, r]``."""
    if weight_ids is None:
        return v.sum(0)
    return torch.stack(
        [
            torch.where((weight_ids == s).unsqueeze(1), v, torch.zeros_like(v)).sum(0)
            for s in range(sets)
        ]
    )


def _per_row(bias: Tensor, weight_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``bias`` in ``dtype``; with ``weight_ids``, the bias of each row's set."""
    return (
        bias.to(dtype) if weight_ids is None else bias.to(dtype).index_select(0, weight_ids.long())
    )


def _scaled(u: Tensor, coeff: Tensor | None) -> Tensor:
    return u if coeff is None else u * coeff.to(u.dtype)


def edit(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    read_bias: Tensor | None,
    write: Tensor,
    subtract_bias: Tensor | None,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply the general low-rank edit to the selected rows.

    y = x + B^T (coeff * u) with u = act(z) - (B x + p) and z = A x + c. The term B x is subtracted
    only with ``subtract_projection``.

    Args:
        source: ``[M, d]``, the hidden states.
        out: ``[M, d]``, receives y in the selected rows. May be ``source``.
        rows: int32 ``[N]`` or None for all rows; -1 skips an entry.
        weight_ids: int32 ``[N]`` or None. With it, the weights have a leading dimension S.
        read: A ``[r, d]`` or None.
        read_bias: c ``[r]`` or None.
        write: B ``[r, d]``.
        subtract_bias: p ``[r]`` or None.
        coeff: ``[N, r]`` or None.
        subtract_projection: Whether B x is subtracted.
        activation: Canonical activation name.
        save: Whether to return the tensors that the backward pass needs.

    Returns:
        ``saved_input`` (the selected rows of ``source``, ``[N, d]``), ``u`` and ``z`` (``[N, r]``,
        fp32 or fp64). A tensor that the backward pass does not need is empty.
    """
    acc = accumulation_dtype(source.dtype)
    selection = _select(rows)
    weight_ids, coeff = selection.take_optional(weight_ids), selection.take_optional(coeff)
    with _no_autocast(source):
        saved_input = _take(source, selection.rows)
        x = saved_input.to(acc)
        folded = subtract_projection and activation == "linear"
        if read is not None and folded:
            z = _project(x, read.to(acc) - write.to(acc), weight_ids)
        elif read is not None:
            z = _project(x, read, weight_ids)
        else:
            z = x.new_zeros((x.shape[0], write.shape[-2]))
            if folded:
                z = -_project(x, write, weight_ids)
        if read_bias is not None:
            z = z + _per_row(read_bias, weight_ids, acc)
        u = activate(z, activation)
        if subtract_projection and not folded:
            u = u - _project(x, write, weight_ids)
        if subtract_bias is not None:
            u = u - _per_row(subtract_bias, weight_ids, acc)
        y = x + _expand(_scaled(u, coeff), write, weight_ids)
        _scatter(out, selection.rows, y, _all_skipped(selection), x)
    if not save:
        return source.new_empty(0), u.new_empty(0), u.new_empty(0)
    return (
        source.new_empty(0) if rows is None else saved_input,
        selection.mask(u),
        u.new_empty(0) if activation == "linear" else selection.mask(z),
    )


def edit_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    u: Tensor,
    z: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    read: Tensor | None,
    write: Tensor,
    coeff: Tensor | None,
    subtract_projection: bool,
    activation: str,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`edit` in closed form.

    With delta = B g, ddelta = coeff * delta and dz = act'(z) * ddelta on the selected rows:

        dh = g + A^T dz - B^T ddelta
        dA = dz^T x
        dc = sum dz
        dB = (coeff * u)^T g - ddelta^T x
        dp = -sum ddelta
        dcoeff = u * delta

    The terms -B^T ddelta and -ddelta^T x and the gradient dp exist only with
    ``subtract_projection``.

    Args:
        grad: g ``[M, d]``.
        out: ``[M, d]``, receives dh in the selected rows. May be ``grad``. None to omit dh.
        saved_input: ``[N, d]``, or the output of the edit ``[M, d]`` if ``rows`` is None.
        u, z: Results of :func:`edit`.
        rows, weight_ids, read, write, coeff: Arguments of :func:`edit`.
        subtract_projection, activation: Arguments of :func:`edit`.
        need_weights: Whether to compute dA, dc, dB and dp.

    Returns:
        dA, dc, dB, dp and dcoeff in fp32 or fp64. A gradient that is not needed is empty.
    """
    acc = accumulation_dtype(grad.dtype)
    sets = write.shape[0] if weight_ids is not None else 1
    selection = _select(rows)
    weight_ids, coeff = selection.take_optional(weight_ids), selection.take_optional(coeff)
    grad_read, grad_bias, grad_write, grad_subtract_bias, grad_coeff = (
        grad.new_empty(0, dtype=acc) for _ in range(5)
    )
    with _no_autocast(grad):
        g = _take(grad, selection.rows).to(acc)
        delta = _project(g, write, weight_ids)
        ddelta = _scaled(delta, coeff)
        dz = (
            ddelta
            if activation == "linear"
            else ddelta * activation_derivative(selection.take(z), activation)
        )
        if coeff is not None:
            grad_coeff = selection.mask(u * delta)
        if need_weights:
            used = _scaled(u, coeff)
            x = (
                saved_input.to(acc)
                if rows is not None
                else saved_input.to(acc) - _expand(used, write, weight_ids)
            )
            masked_dz, masked_ddelta = selection.mask(dz), selection.mask(ddelta)
            grad_bias = _row_sum(masked_dz, weight_ids, sets)
            grad_write = _outer(used, g, weight_ids, sets)
            if read is not None:
                grad_read = _outer(masked_dz, x, weight_ids, sets)
            if subtract_projection:
                same = activation == "linear" and read is not None
                grad_write = grad_write - (
                    grad_read if same else _outer(masked_ddelta, x, weight_ids, sets)
                )
                grad_subtract_bias = -_row_sum(masked_ddelta, weight_ids, sets)
        if out is not None:
            if subtract_projection and activation == "linear" and read is not None:
                dh = g + _expand(dz, read.to(acc) - write.to(acc), weight_ids)
            else:
                dh = g if read is None else g + _expand(dz, read, weight_ids)
                dh = dh - _expand(ddelta, write, weight_ids) if subtract_projection else dh
            _scatter(out, selection.rows, dh, _all_skipped(selection), g)
    return grad_read, grad_bias, grad_write, grad_subtract_bias, grad_coeff


def red(
    source: Tensor,
    out: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    save: bool,
) -> Tensor:
    """Apply RED, y = scale * x + bias, to the selected rows.

    Args:
        source: ``[M, d]``, the hidden states.
        out: ``[M, d]``, receives y in the selected rows. May be ``source``.
        rows: int32 ``[N]`` or None for all rows; -1 skips an entry.
        weight_ids: int32 ``[N]`` or None.
        scale: ``[d]``, or ``[S, d]`` with ``weight_ids``.
        bias: Same shape as ``scale``.
        save: Whether to return the input that the backward pass needs.

    Returns:
        The selected rows of ``source``, ``[N, d]``; empty without ``save``.
    """
    acc = accumulation_dtype(source.dtype)
    selection = _select(rows)
    weight_ids = selection.take_optional(weight_ids)
    saved_input = _take(source, selection.rows)
    if save and out is source and rows is None:
        saved_input = saved_input.clone()
    x = saved_input.to(acc)
    y = _per_row(scale, weight_ids, acc) * x + _per_row(bias, weight_ids, acc)
    _scatter(out, selection.rows, y, _all_skipped(selection), x)
    return saved_input if save else source.new_empty(0)


def red_backward(
    grad: Tensor,
    out: Tensor | None,
    saved_input: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    scale: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`red`.

    dh = scale * g, dscale = sum_n g * x and dbias = sum_n g over the selected rows.

    Args:
        grad: g ``[M, d]``.
        out: ``[M, d]``, receives dh in the selected rows. May be ``grad``. None to omit dh.
        saved_input: The result of :func:`red`, ``[N, d]``.
        rows, weight_ids, scale: Arguments of :func:`red`.
        need_weights: Whether to compute dscale and dbias.

    Returns:
        dscale and dbias, shaped like ``scale``, in fp32 or fp64; empty without ``need_weights``.
    """
    acc = accumulation_dtype(grad.dtype)
    sets = scale.shape[0] if weight_ids is not None else 1
    selection = _select(rows)
    weight_ids = selection.take_optional(weight_ids)
    g = _take(grad, selection.rows).to(acc)
    grad_scale, grad_bias = grad.new_empty(0, dtype=acc), grad.new_empty(0, dtype=acc)
    if need_weights:
        masked = selection.mask(g)
        grad_scale = _row_sum(masked * saved_input.to(acc), weight_ids, sets)
        grad_bias = _row_sum(masked, weight_ids, sets)
    if out is not None:
        _scatter(
            out, selection.rows, _per_row(scale, weight_ids, acc) * g, _all_skipped(selection), g
        )
    return grad_scale, grad_bias
