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

from collections.abc import Iterator

from torch import Tensor

from reft_kernels.triton import orthonormal_launch
from reft_kernels.triton.orthonormal_backward import build_backward, build_backward_kernel
from reft_kernels.triton.orthonormal_forward import build, build_kernel
from reft_kernels.triton.orthonormal_gram import gram_kernel


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
    """Yield the variants of the kernels for ahead-of-time compilation.

    Each is ``(jit_function, signature, constexprs, num_warps, num_stages)``, in fp32, for both
    maps, with and without ``base`` and ``W``. Compile CUDA targets with ``common.CUDA_OPTIONS``.
    """
    config = orthonormal_launch.build_config(32, d, r, 132)
    for is_cayley in (False, True):
        for has_base in (False, True):
            for has_W in (False, True):
                no_base = () if has_base else ("base", "point")
                no_signs = () if has_base else ("signs",)
                no_W = () if has_W else ("W", "D")
                no_grad_D = () if has_W else ("grad_D",)
                variants = [
                    (build_kernel, no_base + no_signs + no_W),
                    (build_backward_kernel, no_base + no_signs + no_grad_D),
                    (gram_kernel, no_base + no_grad_D),
                ]
                if not has_W:
                    variants.append((gram_kernel, (*no_base, "grad_R", "grad_D")))
                for kernel, absent in variants:
                    first = kernel is gram_kernel
                    constexprs = {
                        "r": r,
                        # a launch also specializes arguments that are 1
                        **({"rank": 1} if r == 1 and not first else {}),
                        "CAYLEY": is_cayley,
                        **(config.gram_constexprs() if first else config.constexprs()),
                        **{name: None for name in absent if name in kernel.arg_names},
                    }
                    types = {
                        "d": "i32",
                        "rank": "i32",
                        "chunk": "i32",
                        "scratch": "*fp64",
                        **dict.fromkeys(constexprs, "constexpr"),
                    }
                    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
                    warps = config.gram_warps if first else config.num_warps
                    stages = config.gram_stages if first else config.num_stages
                    yield kernel, signature, constexprs, warps, stages
