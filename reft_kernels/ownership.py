"""Detects whether a backward function may edit its incoming gradient in place.

A backward function may overwrite a gradient only if nothing else holds it. This is decided from
three reference counts: C++ references to the tensor, Python references to it, and references to its
storage. Another consumer of the gradient, a user hook, or a tensor passed to
``backward(gradient=...)`` increases at least one of them. The counts of an unshared gradient depend
on the Python version, so :func:`calibrate` measures them once. A gradient with different counts, a
view, or a non-contiguous gradient is treated as shared.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import function

baseline: tuple[int, int, int] | None = None
_lock = threading.Lock()


def _counts(grad: Tensor) -> tuple[int, int, int]:
    """Return the tensor, Python object and storage reference counts of ``grad``."""
    return (
        grad._use_count(),  # type: ignore[attr-defined]  # missing from PyTorch's type stubs
        sys.getrefcount(grad),
        torch._C._storage_Use_Count(grad.untyped_storage()._cdata),
    )


def is_sole_owner(grad: Tensor) -> bool:
    """Return whether only the calling ``backward`` function holds ``grad``.

    Must be called directly from ``backward``, with its argument and no further reference to it:
    the call depth and local variables change the Python reference count.
    """
    if (
        baseline is None
        or torch.is_grad_enabled()
        or grad.requires_grad
        or grad._is_view()
        or not grad.is_contiguous()
    ):
        return False
    return _counts(grad) == baseline


def once_differentiable(backward: Callable) -> Callable:
    """torch's decorator, without its cost where no graph of the backward is asked for."""
    guarded = function.once_differentiable(backward)

    def called(ctx, grad):
        return guarded(ctx, grad) if torch.is_grad_enabled() else backward(ctx, grad)

    return called


class _Probe(torch.autograd.Function):
    seen: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable  # the wrapper adds references, so use the same one as the edits do
    def backward(ctx, grad):
        _Probe.seen = _probe(grad)
        return grad


def _probe(grad: Tensor) -> tuple[int, int, int]:
    """Count references at the same call depth as :func:`is_sole_owner`."""
    return _counts(grad)


def calibrate() -> None:
    """Measure the reference counts of an unshared gradient.

    The first edit that is recorded for a backward pass calls this; later calls do nothing.
    """
    global baseline
    if torch.compiler.is_compiling() or baseline is not None:
        return
    with (
        _lock,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        x = torch.ones(4, 4, device="cpu", requires_grad=True)
        (_Probe.apply(x) * 2.0).backward(torch.ones_like(x))
        baseline = _Probe.seen
