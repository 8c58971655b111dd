"""One LoReFT edit, h + R^T(Wh + b - Rh), by each backend of reft_kernels and by PyTorch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import reft_kernels
from benchmarks.protocol import AccuracyCheck, Call, Provider
from reft_kernels import dispatch

EditFunction = Callable[..., Tensor]
# allowed error: EPS units of the dtype's precision, or TIMES the error of the unfolded formula
EPS, TIMES = 16, 2


@dataclass(frozen=True)
class Problem:
    """One input set.

    Attributes:
        hidden, grad: The hidden state and its gradient, ``[N, d]``.
        weights: R and W ``[r, d]`` and b ``[r]`` in fp32.
    """

    hidden: Tensor
    grad: Tensor
    weights: tuple[Tensor, Tensor, Tensor]

    def leaves(self) -> list[Tensor]:
        """Return new leaf tensors: the hidden state, R, W and b."""
        return [t.detach().requires_grad_() for t in (self.hidden, *self.weights)]


def weights(d: int, rank: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random R, W and b, where R has orthonormal rows.

    W is scaled so that repeated edits keep the size of Rh.
    """
    R = reft_kernels.householder(torch.randn(d, rank, device=device) / d**0.5)
    return R, torch.randn(rank, d, device=device) / d**0.5, torch.randn(rank, device=device)


def draw(rows: int, d: int, rank: int, dtype: torch.dtype, device: str, sets: int) -> list[Problem]:
    """Return ``sets`` input sets with equal weights.

    On a GPU each set has its own copy of them, as each layer of a model has its own weights.
    """
    common = weights(d, rank, device)

    def normal() -> Tensor:
        return torch.randn(rows, d, device=device, dtype=torch.float32).to(dtype)

    def own() -> tuple[Tensor, Tensor, Tensor]:
        R, W, b = common
        return (R.clone(), W.clone(), b.clone()) if device == "cuda" else common

    return [Problem(normal(), normal(), own()) for _ in range(sets)]


def eager_folded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Compute the edit with two matrix products, from D = W - R."""
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + linear(h, W - R, b) @ R


def eager_unfolded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Compute the edit with three matrix products, as the formula is written."""
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + (linear(h, W, b) - h @ R.mT) @ R


def backends(device: str) -> dict[str, str | None]:
    """Return the provider names of reft_kernels and the backend that each one forces.

    The default choice (None) comes first, followed by every other backend that supports the device.
    """
    chosen, _ = dispatch.choose("edit", device, torch.float32)
    able = [
        name
        for name in dispatch.BACKENDS
        if dispatch.unsupported_reason(name, "edit", device, torch.float32) is None
    ]
    return {"reft_kernels": None} | {
        f"reft_kernels, {name} backend": name for name in able if name != chosen
    }


def force_backend(backend: str | None, call: Call, like: Tensor) -> Call:
    """Return the call with forward and backward run by one backend.

    The selection of the backend is not timed. With ``backend=None`` the call is returned as it is.
    """
    if backend is None:
        return call

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        with dispatch.backend(backend):
            for operator in dispatch.OPERATORS:
                dispatch.select(operator, like)
            yield

    return dataclasses.replace(call, context=context)


def check_with_backend(
    backend: str | None, check: Callable[[EditFunction], AccuracyCheck], edit: EditFunction
) -> AccuracyCheck:
    """Check an edit while one backend is forced."""
    with dispatch.backend(backend) if backend else contextlib.nullcontext():
        return check(edit)


def _results(
    edit: EditFunction, problem: Problem, dtype: torch.dtype, backward: bool
) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in (problem.hidden, *problem.weights)]
    if dtype != torch.float64:
        leaves[1:] = [t.detach().clone().requires_grad_() for t in problem.weights]
    out = edit(*leaves)
    results = [out.detach()]
    if backward:
        results += torch.autograd.grad(
            out, leaves, problem.grad.to(out.dtype), allow_unused=True, materialize_grads=True
        )
    return results


class EditGate:
    """Compare edits of one input set with fp64: the output and, optionally, the four gradients.

    The allowed error is 16 units of the dtype's precision, relative to the largest reference value,
    or twice the error of the unfolded formula in PyTorch in the same dtype, whichever is larger.
    This detects incorrect results; tighter bounds are left to the tests. The result is for the
    output or gradient whose error is largest relative to its allowed error.
    """

    def __init__(self, problem: Problem, backward: bool) -> None:
        self.problem, self.backward = problem, backward
        self._exact = _results(eager_unfolded, problem, torch.float64, backward)
        rounding = EPS * torch.finfo(problem.hidden.dtype).eps
        self._allowed = [max(TIMES * error, rounding) for error in self._distances(eager_unfolded)]

    def _distances(self, edit: EditFunction) -> list[float]:
        return self._errors(_results(edit, self.problem, self.problem.hidden.dtype, self.backward))

    def _errors(self, results: Sequence[Tensor]) -> list[float]:
        pairs = zip(results, self._exact, strict=True)
        return [
            float((value.double() - exact).abs().max() / exact.abs().max())
            for value, exact in pairs
        ]

    def __call__(self, edit: EditFunction) -> AccuracyCheck:
        return self._largest(self._distances(edit))

    def judge(self, results: Sequence[Tensor]) -> AccuracyCheck:
        """Check an output and the gradients of the hidden state, R, W and b."""
        return self._largest(self._errors(results))

    def _largest(self, errors: list[float]) -> AccuracyCheck:
        pairs = zip(errors, self._allowed, strict=True)
        return AccuracyCheck(*max(pairs, key=lambda pair: pair[0] / pair[1]))


def provider(
    edit: EditFunction,
    problems: Sequence[Problem],
    mode: str,
    gate: EditGate | None,
    backend: str | None = None,
    **call: bool,
) -> Provider:
    """Return a provider that times ``edit`` on each input set.

    Args:
        edit: Function of the hidden state, R, W and b.
        problems: Input sets.
        mode: ``forward``, ``backward`` or ``both``.
        gate: Accuracy check, or None for no check.
        backend: Backend of reft_kernels to force.
        call: Further fields of :class:`benchmarks.protocol.Call`.
    """

    def forward(problem: Problem) -> Call:
        def run(_: object) -> Tensor:
            with torch.no_grad():
                return edit(problem.hidden, *problem.weights)

        return Call(run, **call)

    def both(problem: Problem) -> Call:
        leaves = problem.leaves()
        return Call(lambda _: torch.autograd.grad(edit(*leaves), leaves, problem.grad), **call)

    def backward(problem: Problem) -> Call:
        leaves = problem.leaves()
        calls = {
            "run": lambda out: torch.autograd.grad(out, leaves, problem.grad),
            "before": lambda: edit(*leaves),
            "repeatable": lambda out: torch.autograd.grad(
                out, leaves, problem.grad, retain_graph=True
            ),
        }
        return Call(**calls, **call)

    make = {"forward": forward, "backward": backward, "both": both}[mode]
    return Provider(
        lambda k: force_backend(backend, make(problems[k]), problems[k].hidden),
        check=(lambda: check_with_backend(backend, gate, edit)) if gate else None,
    )


def touched_bytes(rows: int, d: int, dtype: torch.dtype, mode: str) -> int:
    """Return the bytes of distinct memory that a call reads and writes, without the weights.

    The backward mode counts the gradients alone, the least that a backward function touches.
    """
    return (4 if mode == "both" else 2) * rows * d * dtype.itemsize


def least_bytes(rows: int, d: int, rank: int, dtype: torch.dtype, mode: str) -> int:
    """Return the minimum memory traffic of an edit in bytes.

    Forward reads and writes h. Backward reads h and its gradient and writes a gradient. Weights and
    their gradients are added.
    """
    state, weight = rows * d * dtype.itemsize, 2 * rank * d * 4
    forward, backward = 2 * state + weight, 3 * state + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]
