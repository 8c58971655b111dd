"""Householder and Cayley maps for all layers in one launch.

The maps, signs and base points are defined in :mod:`reft_kernels.orthonormal`. The kernels store V
without its unit diagonal, which is then exact. With E the first r columns of the identity:

    F = L M + E P, with F(0) = E
    householder   L = tril(X, -1), V = E + L, M = T V[:r]^T, P = M - I
                  V^T V = I + L[:r] + L[:r]^T + L^T L
                  (the product of reflectors is -F)
    cayley        L = V = [0; X[r:]], M = -2C, P = 2C - I

The grid is (splits of d, layers). Every program of a layer computes the whole Gram matrix and the
r x r matrices itself, in fp64 and in its own scratch memory, and then writes its part of the d
rows. Programs do not depend on each other, and results are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from reft_kernels.triton import orthonormal_launch
from reft_kernels.triton.orthonormal_backward import build_backward, build_backward_kernel
from reft_kernels.triton.orthonormal_forward import build, build_kernel


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


def aot_specs(d: int, r: int) -> Iterator[tuple]:
    """Yield the variants of both kernels for ahead-of-time compilation.

    Each is ``(jit_function, signature, constexprs, num_warps, num_stages)``, in fp32, for both
    maps, with and without ``base`` and ``W``. Compile CUDA targets with ``common.CUDA_OPTIONS``.
    """
    config = orthonormal_launch.build_config(32, d, r, 132)
    for is_cayley in (False, True):
        for has_base in (False, True):
            for has_W in (False, True):
                for kernel, of_base, of_W in (
                    (build_kernel, ("signs", "base", "point"), ("W", "D")),
                    (build_backward_kernel, ("signs", "base"), ("grad_D",)),
                ):
                    absent = (() if has_base else of_base) + (() if has_W else of_W)
                    constexprs = {
                        "CAYLEY": is_cayley,
                        **config.constexprs(),
                        **dict.fromkeys(absent),
                    }
                    if r == 1:  # a launch also specializes arguments that are 1
                        constexprs["r"] = 1
                    types = {
                        "d": "i32",
                        "r": "i32",
                        "chunk": "i32",
                        "wide": "*fp64",
                        **dict.fromkeys(constexprs, "constexpr"),
                    }
                    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
                    yield kernel, signature, constexprs, config.num_warps, config.num_stages
