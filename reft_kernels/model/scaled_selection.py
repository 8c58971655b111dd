"""Selections with a coefficient for each row, from the arguments ``subspaces`` and ``strengths``.

RED, y = scale * x + bias, has no subspace; with a strength s it is
y = (1 + s (scale - 1)) * x + s * bias, RED with other weights: a weight set for each strength.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reft_kernels.arguments import EditWeights, RedWeights
from reft_kernels.checks import mark_rows
from reft_kernels.model.members import Members
from reft_kernels.model.scaling import Examples, Scaling
from reft_kernels.model.selection import Selection
from reft_kernels.model.window import Window


def examples_of(window: Window) -> Examples:
    """The examples of a window, or the sequences of a packed one."""
    count: int | None = window.batch
    if window.packed is not None:
        sequence, compiling = window.packed.sequence, torch.compiler.is_compiling()
        count = None if compiling else int(sequence[-1]) + 1 if sequence.numel() else 0
    return Examples(count, window.generation is not None, window.device)


def check_scaling(
    scaling: Scaling,
    name: str,
    rank: int | None,
    window: Window | None,
    members: Members | None,
    own: Sequence[str],
) -> None:
    """Check the arguments of a call against one adapter.

    Args:
        scaling: the arguments.
        name: name of the adapter.
        rank: its rank; None for RED.
        window: the part of the batch that the forward processes; None for a call without tokens.
        members: the adapter of each example, or None.
        own: paths of edited modules whose rows are not tokens.

    Raises:
        ValueError: the arguments do not fit the adapter or the batch.
    """
    if window is None:
        scaling.check(name, rank, Examples(None, False, torch.device("cpu")))
        return
    chosen = None
    if members is not None:
        if torch.compiler.is_compiling():
            return  # the names are not known here
        chosen = members.examples([name], window.batch)
    scaling.check(name, rank, examples_of(window), chosen)
    if own and not scaling.same:
        argument = "strengths" if scaling.same_columns else "subspaces"
        raise ValueError(
            f"{argument}: got an entry for each example, expected the same for all: adapter "
            f"{name!r} edits {own[0]}, whose rows are not tokens"
        )


def scaled_selection(
    selection: Selection, window: Window, scaling: Scaling, rank: int | None, sets: int
) -> Selection:
    """A selection with the coefficients of its rows.

    Args:
        selection: rows of the whole window.
        window: the part of the batch that the forward processes.
        scaling: the arguments of the call.
        rank: rank of the weights; None for RED.
        sets: number of weight sets of the weights; 1 for none.

    Returns:
        With ``coeff``; for RED with ``strengths``, E of them, and weight ids below E * ``sets``.
    """
    rows, weight_ids = selection.rows, selection.weight_ids
    if rank is not None:
        table = scaling.coefficients(rank, examples_of(window))
        count = window.batch * window.width if rows is None else rows.shape[0]
        coeff = table.repeat(count, 1) if scaling.same else table[_example_of_rows(rows, window)]
        return selection._replace(coeff=coeff)
    if scaling.strengths is None:
        return selection
    factors = scaling.factors(examples_of(window))
    if not scaling.same_strengths:
        ids = _example_of_rows(rows, window) * sets
        ids = ids if weight_ids is None else ids + weight_ids
        weight_ids = mark_rows(ids.to(torch.int32), factors.shape[0] * sets)
    return Selection(rows, weight_ids, strengths=factors)


def _example_of_rows(rows: Tensor | None, window: Window) -> Tensor:
    """The example of each row, int64 ``[N]``; any for skipped rows."""
    if rows is None:
        numbers = torch.arange(window.batch * window.width, device=window.device)
    else:
        numbers = rows.clamp(min=0).to(torch.int64)
    return numbers // window.width if window.packed is None else window.packed.sequence[numbers]


def scaled_red(weights: RedWeights, strengths: Tensor, has_sets: bool) -> RedWeights:
    """The weights of RED for E strengths; exactly ``weights`` for a strength of 1.

    Args:
        weights: ``[d]``, or ``[S, d]`` with weight sets.
        strengths: fp32 ``[E]``.
        has_sets: whether the result has weight sets; without, E is 1.

    Returns:
        ``[E * S, d]``, the S sets of each strength in turn; or ``[d]``.
    """
    scale, bias = (t if t.dim() == 2 else t.unsqueeze(0) for t in weights)
    factors = strengths.to(scale.device, scale.dtype).view(-1, 1, 1)
    scaled = torch.lerp(torch.ones_like(scale), scale, factors), bias * factors
    return RedWeights(*(t.flatten(0, 1) if has_sets else t.reshape(-1) for t in scaled))


def rank_of(weights: EditWeights | RedWeights) -> int | None:
    """The rank of the weights of a layer; None for RED."""
    return None if isinstance(weights, RedWeights) else weights.write.shape[-2]
