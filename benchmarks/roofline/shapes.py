"""Calls of operators whose launches are estimated: the shapes that the project is tuned for.

Edits are LoReFT with D = W - R, as the modules launch them. Tensors are allocated on the CPU and
never written, so a shape of gigabytes costs address space only.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

ROWS_IN_STATE = 8192  # rows of the hidden state from which a few are selected
LAYERS = (1, 32)
SELECTED = (112, 448)  # f7+l7 of 8 and of 32 prompts
ALL = (8192, 65536)
WIDE_RANKS = (32, 64)  # at which selected rows are estimated, too


@dataclass(frozen=True)
class Question:
    """One call of an operator.

    Attributes:
        operator: What is called.
        shape: Rows or layers, as text.
        call: Makes the call.
        ideal_bytes: Bytes that any implementation moves: every tensor of hidden states, or of the
            size of X, once.
        clone_bytes: Size of the tensor whose clone the call is compared with.
        elements: Elements of hidden state or of R, by which instructions are divided.
    """

    operator: str
    shape: str
    call: Callable[[], Any]
    ideal_bytes: int
    clone_bytes: int
    elements: int


def _backend(name: str) -> Any:
    return importlib.import_module(f"reft_kernels.{name}")


class EditCall:
    """The tensors of one edit and its backward pass.

    Args:
        num_rows: N.
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        selected: Whether N rows of a larger state are selected.
        subtract_projection, activation: As in :func:`reft_kernels.reference.edit`.
        sets: Whether rows choose among two weight sets and have coefficients.
        backend: ``"triton"`` or ``"cuda"``.
        rounded: Whether the forward pass takes bf16 copies of the matrices, as stacked modules give
            them to Triton's edits of bf16 hidden states; None for these only.
    """

    def __init__(
        self,
        num_rows: int,
        d: int,
        rank: int,
        dtype: torch.dtype,
        selected: bool,
        subtract_projection: bool = False,
        activation: str = "linear",
        sets: bool = False,
        *,
        backend: str = "triton",
        rounded: bool | None = None,
    ) -> None:
        self.backend = _backend(backend)
        whole = max(ROWS_IN_STATE, num_rows) if selected else num_rows
        shape = (2, rank, d) if sets else (rank, d)
        self.hidden = torch.empty(whole, d, dtype=dtype)
        step = whole // num_rows
        self.rows = torch.arange(0, whole, step, dtype=torch.int32)[:num_rows] if selected else None
        self.weight_ids = (torch.arange(num_rows) % 2).int() if sets else None
        self.read, self.write = torch.empty(shape), torch.empty(shape)
        self.bias = torch.empty(shape[:-1])
        self.coeff = torch.empty(num_rows, rank) if sets else None
        self.subtract_projection, self.activation = subtract_projection, activation
        if rounded is None:
            rounded = dtype == torch.bfloat16 and backend == "triton"
        kind = torch.bfloat16 if rounded else torch.float32
        self.forward_matrices = self.read.to(kind), self.write.to(kind)

    def forward(self, save: bool = True) -> tuple:
        """Edit in place."""
        read, write = self.forward_matrices
        return self.backend.edit(
            self.hidden,
            self.hidden,
            self.rows,
            self.weight_ids,
            read,
            self.bias,
            write,
            None,
            self.coeff,
            self.subtract_projection,
            self.activation,
            save,
        )

    def backward(self) -> None:
        """Compute all gradients from what an edit saves; the gradient is edited in place."""
        allocation = importlib.import_module("reft_kernels.allocation")
        saved, u, z = allocation.edit_saved(
            self.hidden, self.rows, self.write, self.activation, True
        )
        grad = torch.empty_like(self.hidden)
        self.backend.edit_backward(
            grad,
            grad,
            saved if self.rows is not None else self.hidden,
            u,
            z,
            self.rows,
            self.weight_ids,
            self.read,
            self.write,
            self.coeff,
            self.subtract_projection,
            self.activation,
            True,
        )


def build(
    layers: int, d: int, rank: int, cayley: bool = False, W: bool = True, backend: str = "triton"
) -> None:
    """Build R, and with ``W`` D = W - R, of all layers."""
    name = "cayley" if cayley else "householder"
    target = torch.empty(layers, rank, d) if W else None
    getattr(_backend(backend), name)(torch.empty(layers, d, rank), None, None, None, target)


def build_backward(
    layers: int, d: int, rank: int, cayley: bool = False, backend: str = "triton"
) -> None:
    """Compute the gradient of X of all layers."""
    name = "cayley_backward" if cayley else "householder_backward"
    grads = torch.empty(layers, rank, d), torch.empty(layers, rank, d)
    X, aux = torch.empty(layers, d, rank), torch.empty(layers, 1, rank, rank)
    getattr(_backend(backend), name)(*grads, X, None, None, aux)


def red(num_rows: int, d: int, dtype: torch.dtype, selected: bool, backward: bool) -> None:
    """Make one call of RED or of its backward pass."""
    edit = EditCall(num_rows, d, 1, dtype, selected)
    scale, bias = torch.empty(1, d), torch.empty(1, d)
    if not backward:
        edit.backend.red(edit.hidden, edit.hidden, edit.rows, None, scale, bias, True)
        return
    saved = torch.empty(num_rows, d, dtype=dtype)
    edit.backend.red_backward(edit.hidden, edit.hidden, saved, edit.rows, None, scale, True)


def _of_edit(edit: EditCall, shape: str, n: int) -> list[Question]:
    """Return the calls of an edit of n rows, forward and backward."""
    d = edit.hidden.shape[1]
    state = n * d * edit.hidden.element_size()
    # selected rows are saved for the backward pass
    moved = (2 if edit.rows is None else 3) * state
    return [
        Question("edit", shape, edit.forward, moved, state, n * d),
        Question("edit backward", shape, edit.backward, 3 * state, state, n * d),
    ]


def wide_questions(d: int, rank: int, dtype: torch.dtype, backend: str) -> list[Question]:
    """Return the edits of selected rows at WIDE_RANKS other than ``rank``."""
    return [
        question
        for r in WIDE_RANKS
        for n in SELECTED
        if r != rank and r <= d
        for question in _of_edit(
            EditCall(n, d, r, dtype, True, backend=backend), f"{n:,} selected rows, r = {r}", n
        )
    ]


def questions(
    d: int = 4096,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    rows: tuple[int, ...] | None = None,
    backend: str = "triton",
) -> list[Question]:
    """Return the calls at one width, rank and dtype.

    Args:
        d: Number of columns.
        rank: r.
        dtype: dtype of the hidden states.
        rows: Numbers of rows instead of ``SELECTED`` and ``ALL``; up to 1,024 are selected rows.
        backend: ``"triton"`` or ``"cuda"``.
    """
    result = []
    counts = SELECTED + ALL if rows is None else rows
    for n in counts:
        selected = n in SELECTED if rows is None else n <= 1024
        edit = EditCall(n, d, rank, dtype, selected, backend=backend)
        shape = f"{n:,} {'selected' if selected else 'of all'} rows"
        result += _of_edit(edit, shape, n)
    for layers in LAYERS:
        size = layers * d * rank * 4
        shape = f"{layers} layer{'s' if layers > 1 else ''}"
        for name, call in (("R build", build), ("R build backward", build_backward)):
            result.append(
                Question(
                    name,
                    shape,
                    functools.partial(call, layers, d, rank, backend=backend),
                    4 * size,
                    size,
                    layers * d * rank,
                )
            )
    return result
