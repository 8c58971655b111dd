"""Is a gradient ours alone? Only then may a backward edit it in place.

Inside a Python ``backward`` a gradient that only the engine holds shows one C++ owner of the
tensor, a known number of Python references and of storage owners. Another consumer, a user's hook
or a tensor passed to ``backward(gradient=...)`` raises one of the three. The known numbers differ
between Python releases, so they are read off a gradient that is certainly owned; whatever differs
from them, is a view or is not dense is taken as shared, and copied.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_baseline: tuple[int, int, int] | None = None
_lock = threading.Lock()


def _counts(grad: Tensor) -> tuple[int, int, int]:
    return (
        grad._use_count(),
        sys.getrefcount(grad),
        torch._C._storage_Use_Count(grad.untyped_storage()._cdata),
    )


def is_sole_owner(grad: Tensor) -> bool:
    """True when nobody but the calling ``backward`` holds ``grad``; call it with the bare
    argument of ``backward``.
    """
    if (
        _baseline is None
        or torch.is_grad_enabled()
        or grad.requires_grad
        or grad._is_view()
        or not grad.is_contiguous()
    ):
        return False
    return _counts(grad) == _baseline


class _Probe(torch.autograd.Function):
    seen: tuple[int, int, int] | None = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable  # as the edits' backwards are: its wrapper holds references too
    def backward(ctx, grad):
        _Probe.seen = _probe(grad)
        return grad


def _probe(grad: Tensor) -> tuple[int, int, int]:
    """As deep in the call stack as ``owned``, so that the reference counts compare."""
    return _counts(grad)


def calibrate() -> None:
    """Learn the counts of an owned gradient, once for the process; called by the first edit that
    will need a backward.
    """
    global _baseline
    if torch.compiler.is_compiling() or _baseline is not None:
        return
    with (
        _lock,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        x = torch.ones(4, 4, device="cpu", requires_grad=True)
        (_Probe.apply(x) * 2.0).backward(torch.ones_like(x))
        _baseline = _Probe.seen
