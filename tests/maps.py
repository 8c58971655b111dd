"""The orthonormal maps of a backend against reft_kernels/orthonormal.py in fp64: inputs of the
operators, and the budget.

The budget is that of tests/budget.py, with the torch functions in fp32 as the straightforward
computation.
"""

from __future__ import annotations

import torch

from reft_kernels import orthonormal
from reft_kernels.parametrization import base_point

MAPS = ("householder", "cayley")


def draw(layers, d, r, device, *, base=False, signs=True, W=True, dtype=torch.float32, scale=0.3):
    """X, signs, base, point, W as the operators take them."""
    X = (scale * torch.randn(layers, d, r, device=device)).to(dtype)
    reflectors = point = None
    sign = torch.randn(layers, r, device=device).sign() if signs else None
    if base:
        frame = torch.linalg.qr(torch.randn(layers, d, r, dtype=torch.float64)).Q
        point, reflectors, sign = (t.to(device) for t in base_point(frame.mT.float()))
    return X, sign, reflectors, point, torch.randn(layers, r, d, device=device) if W else None


def both(module, name, given, grads):
    """Forward and backward of one map: R, D, aux, grad_X."""
    outputs = getattr(module, name)(*given)
    return *outputs, getattr(module, f"{name}_backward")(*grads, *given[:3], outputs[2])


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


def check(module, name, draws):
    """Hold each output of a backend's map to the budget over several draws of (inputs, grads)."""
    found = {}
    for given, grads in draws:
        exact = both(orthonormal, name, double(given), double(grads))
        plain = both(orthonormal, name, given, grads)
        ours = both(module, name, given, grads)
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
                found.setdefault((label, torch.finfo(got.dtype).eps), []).append(
                    [float(n) for n in numbers]
                )
        assert not ours[3].triu().any(), "grad_X: entries on or above the diagonal"
    for (label, eps), numbers in found.items():
        error, straightforward, size = (max(column) for column in zip(*numbers, strict=True))
        allowed = 2 * straightforward + eps * size
        assert error <= allowed, (
            f"{label}: {error:.2e} over the budget {allowed:.2e} (straightforward: "
            f"{straightforward:.2e})"
        )
