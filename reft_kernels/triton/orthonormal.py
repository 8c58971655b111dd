"""Householder and Cayley maps for all layers in two launches.

The maps, signs and base points are defined in :mod:`reft_kernels.orthonormal`. The kernels store V
without its unit diagonal, which is then exact. With E the first r columns of the identity:

    F = L M + E P, with F(0) = E
    householder   L = tril(X, -1), V = E + L, M = T V[:r]^T, P = M - I
                  V^T V = I + L[:r] + L[:r]^T + L^T L
                  (the product of reflectors is -F)
    cayley        L = V = [0; X[r:]], M = -2C, P = 2C - I

The first launch writes partial sums of V^T V (backward: V^T Fbar) over the d rows.
The second reads X again, usually from the L2 cache. Its grid is (splits of d, layers); every
program of a layer adds the partial sums and computes the r x r matrices itself, in fp64 and in its
own scratch memory, and then writes its part of the d rows. The rows of a partial sum depend on d
and r alone, so results are bitwise reproducible and do not depend on the number of layers.
"""

from __future__ import annotations

from torch import Tensor

from reft_kernels.triton.orthonormal_backward import build_backward
from reft_kernels.triton.orthonormal_forward import build


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`reft_kernels.orthonormal.householder`; the results are fp32."""
    return build(False, X, signs, base, point, W)


def householder_backward(
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    """Implement :func:`reft_kernels.orthonormal.householder_backward`."""
    return build_backward(False, grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement :func:`reft_kernels.orthonormal.cayley`; the results are fp32."""
    return build(True, X, signs, base, point, W)


def cayley_backward(
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    """Implement :func:`reft_kernels.orthonormal.cayley_backward`."""
    return build_backward(True, grad_R, grad_D, X, signs, base, aux)
