"""Error budget of a backend's orthonormal maps.

The reference is ``reft_kernels/orthonormal.py`` in fp64. The budget is that of
:mod:`tests.budget`, with the same functions in fp32 as the straightforward computation.
"""

from __future__ import annotations

import torch

from reft_kernels import orthonormal
from reft_kernels.parametrization import base_point

MAPS = ("householder", "cayley")


def draw(layers, d, r, device, *, base=False, signs=True, W=True, dtype=torch.float32, scale=0.3):
    """Return X, signs, base, point and W as arguments of the operators."""
    X = (scale * torch.randn(layers, d, r, device=device)).to(dtype)
    reflectors = point = None
    sign = torch.randn(layers, r, device=device).sign() if signs else None
    if base:
        frame = torch.linalg.qr(torch.randn(layers, d, r, dtype=torch.float64)).Q
        point, reflectors, sign = (t.to(device) for t in base_point(frame.mT.float()))
    return X, sign, reflectors, point, torch.randn(layers, r, d, device=device) if W else None


def both(module, name, arguments, grads):
    """Run forward and backward of one map and return R, D, aux and the gradient of X."""
    outputs = getattr(module, name)(*arguments)
    return *outputs, getattr(module, f"{name}_backward")(*grads, *arguments[:3], outputs[2])


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(module, name, draws):
    """Check each output of a backend's map against the budget.

    Args:
        module: Module with the backend's maps.
        name: ``householder`` or ``cayley``.
        draws: Pairs of arguments and gradients.
    """
    errors = {}
    for arguments, grads in draws:
        exact = both(orthonormal, name, double(arguments), double(grads))
        plain = both(orthonormal, name, arguments, grads)
        ours = both(module, name, arguments, grads)
        for label, ref, theirs, got in zip(
            ("R", "D", "aux", "grad_X"), exact, plain, ours, strict=True
        ):
            assert (got.shape, got.dtype) == (theirs.shape, theirs.dtype), label
            assert got.is_contiguous() and got.isfinite().all(), label
            if ref.numel():
                numbers = (
                    (got.double() - ref).abs().max(),
                    (theirs.double() - ref).abs().max(),
                    ref.abs().max(),
                )
                errors.setdefault((label, torch.finfo(got.dtype).eps), []).append(
                    [float(n) for n in numbers]
                )
        assert not ours[3].triu().any(), "grad_X: entries on or above the diagonal"
    for (label, eps), numbers in errors.items():
        error, straightforward, size = (max(column) for column in zip(*numbers, strict=True))
        allowed = 2 * straightforward + eps * size
        assert error <= allowed, (
            f"{label}: {error:.2e} over the budget {allowed:.2e} (straightforward: "
            f"{straightforward:.2e})"
        )
