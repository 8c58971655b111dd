"""One LoReFT edit by everyone: h + R^T(Wh + b - Rh) by reft_kernels' backends, PyTorch eager and
compiled, and pyreft.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

import reft_kernels
from benchmarks.harness import Call, Provider, Verdict
from reft_kernels import dispatch

Edit = Callable[..., Tensor]
# tolerance of a provider: EPS units of the dtype, or TIMES the error of the unfolded formula
EPS, TIMES = 16, 2


@dataclass(frozen=True)
class Problem:
    """One input set: ``hidden`` and ``grad [N, d]``, fp32 weights R, W ``[r, d]`` and b ``[r]``."""

    hidden: Tensor
    grad: Tensor
    weights: tuple[Tensor, Tensor, Tensor]

    def leaves(self) -> list[Tensor]:
        """Fresh leaves: the hidden state and R, W, b."""
        return [t.detach().requires_grad_() for t in (self.hidden, *self.weights)]


def weights(d: int, rank: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """R with orthonormal rows, and W and b, all random; the edit replaces Rh by values of its size,
    however often repeated.
    """
    R = reft_kernels.householder(torch.randn(d, rank, device=device) / d**0.5)
    return R, torch.randn(rank, d, device=device) / d**0.5, torch.randn(rank, device=device)


def draw(rows: int, d: int, rank: int, dtype: torch.dtype, device: str, sets: int) -> list[Problem]:
    """Input sets of one distribution, with weights in common."""
    common = weights(d, rank, device)

    def normal() -> Tensor:
        return torch.randn(rows, d, device=device, dtype=torch.float32).to(dtype)

    return [Problem(normal(), normal(), common) for _ in range(sets)]


def eager_folded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Two products: D = W - R is read once."""
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + linear(h, W - R, b) @ R


def eager_unfolded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Three products, as the formula is written."""
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + (linear(h, W, b) - h @ R.mT) @ R


def backends(device: str) -> dict[str, str | None]:
    """Names of reft_kernels' providers, and the backend that each forces: its own choice first,
    then every other able one.
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


def forced(backend: str | None, call: Call, like: Tensor) -> Call:
    """The call with every operator served by one backend, the backward's too; the choice itself is
    not timed.
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


def under(backend: str | None, check: Callable[[Edit], Verdict], edit: Edit) -> Verdict:
    """What a gate says of an edit that one backend serves."""
    with dispatch.backend(backend) if backend else contextlib.nullcontext():
        return check(edit)


def _errors(edit: Edit, problem: Problem, dtype: torch.dtype, backward: bool) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in (problem.hidden, *problem.weights)]
    if dtype != torch.float64:
        leaves[1:] = [t.detach().clone().requires_grad_() for t in problem.weights]
    out = edit(*leaves)
    found = [out.detach()]
    if backward:
        found += torch.autograd.grad(
            out, leaves, problem.grad.to(out.dtype), allow_unused=True, materialize_grads=True
        )
    return found


class Gate:
    """Holds edits of one input set to fp64: output and, for a backward, the four gradients.

    An error may be 16 units of the dtype's precision over the largest exact value, or twice that of
    the unfolded formula in
    PyTorch in the same dtype, whichever is more: this tells wrong from right, the engine's own
    contract is the tests' matter. Reported is the output or gradient that comes closest to, or
    leaves, what it is allowed.
    """

    def __init__(self, problem: Problem, backward: bool) -> None:
        self.problem, self.backward = problem, backward
        self._exact = _errors(eager_unfolded, problem, torch.float64, backward)
        rounding = EPS * torch.finfo(problem.hidden.dtype).eps
        self._allowed = [max(TIMES * error, rounding) for error in self._distances(eager_unfolded)]

    def _distances(self, edit: Edit) -> list[float]:
        found = _errors(edit, self.problem, self.problem.hidden.dtype, self.backward)
        pairs = zip(found, self._exact, strict=True)
        return [
            float((own.double() - exact).abs().max() / exact.abs().max()) for own, exact in pairs
        ]

    def __call__(self, edit: Edit) -> Verdict:
        pairs = zip(self._distances(edit), self._allowed, strict=True)
        return Verdict(*max(pairs, key=lambda pair: pair[0] / pair[1]))


def provider(
    edit: Edit,
    problems: Sequence[Problem],
    mode: str,
    gate: Gate | None,
    backend: str | None = None,
    **call: bool,
) -> Provider:
    """Time ``edit`` forward, backward or both, on each input set."""

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
        }
        return Call(**calls, **call | {"capturable": False})

    make = {"forward": forward, "backward": backward, "both": both}[mode]
    return Provider(
        lambda k: forced(backend, make(problems[k]), problems[k].hidden),
        check=(lambda: under(backend, gate, edit)) if gate else None,
    )


def least_bytes(rows: int, d: int, rank: int, dtype: torch.dtype, mode: str) -> int:
    """Bytes that an edit must move: h read and written; backward: h and g read, dh written; weights
    and their gradients.
    """
    state, weight = rows * d * dtype.itemsize, 2 * rank * d * 4
    forward, backward = 2 * state + weight, 3 * state + 2 * weight
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]
