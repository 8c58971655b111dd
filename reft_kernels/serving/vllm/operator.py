"""The operator ``reft_kernels_serving::edit``, called by every decoder layer of a served model.

It is opaque to compilers: the rows and weights of the current step are not its arguments. It runs
the kernel of :mod:`reft_kernels.ops` on the selected rows, once for each form of adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from reft_kernels.serving.steps import Group, Step

NAME = "reft_kernels_serving::edit"

_library = torch.library.Library("reft_kernels_serving", "DEF")
_current: Step | None = None


def has_step() -> bool:
    """Return whether the current forward edits any row."""
    return _current is not None


def set_step(step: Step | None) -> None:
    """Edit as ``step`` says in the forwards that follow; None edits nothing."""
    global _current
    _current = step


@contextlib.contextmanager
def during(step: Step | None) -> Iterator[None]:
    """Edit as ``step`` says in the block; None edits nothing."""
    set_step(step)
    try:
        yield
    finally:
        set_step(None)


def _edit(hidden: Tensor, residual: Tensor, layer: int) -> None:
    """Edit the sum of hidden and residual, ``[M, d]`` each, of the layer with index ``layer``.

    On the selected rows, hidden becomes the edited sum and residual becomes 0.
    """
    if _current is None:
        return
    for group in _current.layers[layer]:
        _edit_rows(hidden, residual, group, _current, layer)


def _edit_rows(hidden: Tensor, residual: Tensor, group: Group, step: Step, layer: int) -> None:
    weights = step.bank.weights(layer, group.form)
    rows = hidden.index_select(0, group.rows).add_(residual.index_select(0, group.rows))
    torch.ops.reft_kernels.edit_(
        rows, None, group.weight_ids, *weights[:4], group.coeff, *group.form[::-1], False
    )
    hidden.index_copy_(0, group.rows, rows)
    residual.index_fill_(0, group.rows, 0)


def _fake(hidden: Tensor, residual: Tensor, layer: int) -> None:
    return None


_library.define("edit(Tensor(a!) hidden, Tensor(b!) residual, int layer) -> ()")
_library.impl("edit", _edit, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=_library)
