"""Backward pass of the edit: at most two launches for a layer.

1. :mod:`reft_kernels.triton.edit_delta` computes ddelta, dz and dcoeff, all ``[N, r]``.
2. :mod:`reft_kernels.triton.edit_gradient` computes dh and the gradients of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common
from reft_kernels.triton.edit_delta import launch_delta
from reft_kernels.triton.edit_gradient import launch_gradient


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
    """Implement :func:`reft_kernels.reference.edit_backward`.

    The second launch is omitted if only dcoeff is needed.
    """
    num_rows = allocation.num_selected_rows(grad, rows)
    linear = activation == "linear"
    grads = allocation.edit_gradients(
        grad, rows, read, write, coeff, subtract_projection, need_weights
    )
    if num_rows == 0:
        for empty_sum in grads:
            empty_sum.zero_()
        return grads
    rows, weight_ids, read, coeff = map(common.contiguous, (rows, weight_ids, read, coeff))
    write, u, z = write.contiguous(), u.contiguous(), z.contiguous()
    dz = grad.new_empty((num_rows, write.shape[-2]), dtype=torch.float32)
    ddelta = torch.empty_like(dz) if subtract_projection and not linear else None
    launch_delta(grad, rows, weight_ids, write, coeff, u, z, dz, ddelta, grads[4], activation)
    if out is not None or need_weights:
        launch_gradient(
            grad,
            out,
            saved_input,
            rows,
            weight_ids,
            read,
            write,
            coeff,
            u,
            dz,
            ddelta,
            grads[:4],
            subtract_projection,
            linear,
            need_weights,
        )
    return grads
