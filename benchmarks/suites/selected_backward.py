"""Backward of an edit of selected rows, in place: cases of suite 2 on a GPU.

The gradient ``[batch * T, d]`` belongs to the call, which overwrites its selected rows and returns
the gradients of R, W and b. reft_kernels is called through its operator, so that the call can be
captured and launches nothing but its kernels. "the rows alone" is the operator on a gradient that
holds only the selected rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import edits
from benchmarks.protocol import AccuracyCheck, Call, Case, Provider
from reft_kernels import dispatch

ALONE = "the rows alone"
Weights = tuple[Tensor, Tensor, Tensor]
# of a gradient, the input rows, u and the weights: edits the gradient, returns those of R, W and b
Backward = Callable[[Tensor, Tensor, Tensor, Weights], tuple[Tensor, Tensor, Tensor]]


class Inputs(Protocol):
    """The shape and the input sets of a case of suite 2."""

    device: str

    def rows(self) -> Tensor:
        """Return the selected rows, int32."""

    def problems(self, sets: int | None = None) -> list[edits.Problem]:
        """Return the input sets."""


def _edited(hidden: Tensor, rows: Tensor | None, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Edit ``hidden`` in place. Returns what the backward reads: its input or output, u and z."""
    R, W, b = weights
    saved, u, z = torch.ops.reft_kernels.edit_.default(
        hidden, rows, None, W, b, R, None, None, True, "linear", True
    )
    return (hidden if rows is None else saved), u, z


def _operator(rows: Tensor | None) -> Backward:
    def backward(
        grad: Tensor, saved: Tensor, u: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor]:
        R, W, _ = weights
        grad_W, grad_b, grad_R, _, _ = torch.ops.reft_kernels.edit_backward_.default(
            grad, saved, u, u.new_empty(0), rows, None, W, R, None, True, "linear", True
        )
        return grad_R, grad_W, grad_b

    return backward


def _eager(wide: Tensor) -> Backward:
    def backward(
        grad: Tensor, saved: Tensor, u: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor, Tensor]:
        R, W = (t.to(grad.dtype) for t in weights[:2])
        u, g = u.to(grad.dtype), grad.index_select(0, wide)
        grad_u = g @ R.mT
        grad.index_copy_(0, wide, g + grad_u @ (W - R))
        grad_W = grad_u.mT @ saved
        return (u.mT @ g - grad_W).float(), grad_W.float(), grad_u.sum(0).float()

    return backward


def case(inputs: Inputs, shape: dict[str, object], sets: int | None = None) -> Case:
    """Return the backward case of a shape of suite 2."""
    problems, rows, device = inputs.problems(sets), inputs.rows(), inputs.device
    wide = rows.long()
    d, dtype = problems[0].hidden.shape[1], problems[0].hidden.dtype
    rank = problems[0].weights[0].shape[0]
    alone = [edits.Problem(p.hidden[wide], p.grad[wide], p.weights) for p in problems]
    gate = edits.EditGate(
        edits.Problem(alone[0].hidden.clone(), alone[0].grad.clone(), alone[0].weights),
        backward=True,
    )

    def provider(
        backward: Backward, sets: list[edits.Problem], chosen: Tensor | None, backend: str | None
    ) -> Provider:
        def forced() -> AbstractContextManager:
            return dispatch.backend(backend) if backend else contextlib.nullcontext()

        def prepare(k: int) -> Call:
            problem = sets[k]
            with forced():  # the forward pass is not timed, and is the same for every call
                saved, u, _ = _edited(problem.hidden.clone(), chosen, problem.weights)
            call = Call(lambda _: backward(problem.grad, saved, u, problem.weights))
            return edits.force_backend(backend, call, problem.grad)

        def check() -> AccuracyCheck:
            with forced():
                return checked(backward, chosen)

        return Provider(prepare, check)

    def checked(backward: Backward, chosen: Tensor | None) -> AccuracyCheck:
        problem = gate.problem  # earlier calls have changed the gradients of the input sets
        if chosen is None:
            hidden, grad = problem.hidden.clone(), problem.grad.clone()
        else:
            hidden = problems[0].hidden.index_copy(0, wide, problem.hidden)
            grad = problems[0].grad.index_copy(0, wide, problem.grad)
        before = grad.clone()
        saved, u, _ = _edited(hidden, chosen, problem.weights)
        gradients = backward(grad, saved, u, problem.weights)
        if chosen is not None:
            rest = torch.ones(grad.shape[0], dtype=torch.bool, device=device)
            rest.index_fill_(0, wide, False)
            if not torch.equal(grad[rest], before[rest]):
                raise RuntimeError("the gradient of a row that is not selected was changed")
            hidden, grad = hidden[wide], grad[wide]
        return gate.judge([hidden, grad, *gradients])

    providers = {ALONE: provider(_operator(None), alone, None, None)}
    for name, backend in edits.backends(device).items():
        providers[name] = provider(_operator(rows), problems, rows, backend)
    providers["eager, in place"] = provider(_eager(wide), problems, rows, None)
    return Case(
        "edit_selected_rows",
        "backward",
        shape,
        dtype,
        providers,
        ALONE,
        len(problems),
        edits.least_bytes(rows.numel(), d, rank, dtype, "backward"),
        [problem.hidden for problem in alone],
    )
