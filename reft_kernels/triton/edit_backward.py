"""Backward pass of the edit: at most two launches for a layer, three for few rows at large ranks.

1. :mod:`reft_kernels.triton.edit_delta` computes dz, coeff * u, ddelta and dcoeff, ``[N, r]``, in
   one launch or two.
2. :mod:`reft_kernels.triton.edit_gradient` computes dh and the gradients of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels import allocation
from reft_kernels.triton import common, edit_gradient, edit_split
from reft_kernels.triton.edit_delta import launch_delta, split_delta


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

    The last launch is omitted if only dcoeff is needed.
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
    second = subtract_projection and not linear
    sets = write.shape[0] if weight_ids is not None else 1
    config = edit_gradient.gradient_config(
        num_rows,
        grad.shape[1],
        write.shape[-2],
        sets,
        grad.dtype,
        second,
        rows is not None,
        common.IS_AMD,
        common.shared_memory(grad.device),
    )
    split = split_delta(num_rows, write, grad.dtype)
    # In groups of 16 words, so that what follows stays aligned
    partial_groups = common.cdiv(edit_gradient.workspace_words(num_rows, write, config, second), 16)
    partials = 0 if split is None else edit_split.partial_words(split, num_rows)
    workspace = grad.new_empty(16 * partial_groups + partials, dtype=torch.float32)
    groups = edit_gradient.counter_groups(write, config)
    launch_delta(
        *(grad, rows, weight_ids, write, coeff, u, z, workspace, groups, grads[4]),
        activation,
        second,
        split,
        partial_groups,
    )
    if out is not None or need_weights:
        edit_gradient.launch_gradient(
            grad,
            out,
            saved_input,
            rows,
            weight_ids,
            read,
            write,
            workspace,
            grads[:4],
            config,
            subtract_projection,
            second,
            need_weights,
        )
    return grads
