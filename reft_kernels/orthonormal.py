"""Householder and Cayley maps and their backward passes in PyTorch, without d x d matrices.

Both maps take ``X [L, d, r]`` to ``Q [L, d, r]`` with orthonormal columns; R = Q^T. Both have the
form

    F(X) = E N + V M,

where E holds the first r columns of the identity, V ``[d, r]`` is taken from X, and M and N
``[r, r]`` are functions of the Gram matrix G = V^T V:

    householder   V = unit lower trapezoidal part of X
                  M = -T V[:r]^T,  N = I,  T = (striu(G) + diag(G)/2)^-1      (compact WY form)
    cayley        V = [0; X[r:]]
                  M = -2C,  N = 2C - I,  C = (I + S + G)^-1,  S = L - L^T,  L = tril(X[:r], -1)

For ``householder``, F is the product of reflectors H_1 ... H_r E, and F(0) = -E. For ``cayley``,
F(0) = E. V is read twice: once to compute G and once to compute F. The result is

    without base  Q = F diag(signs)
    with base     Q = point^T + H0 (F - F(0)) F(0)[:r] diag(signs),
                  where H0 = I - V0 T0 V0^T and H0 E diag(signs) = point^T

With a base, X = 0 therefore gives exactly ``point [L, r, d]``, bit for bit. ``base [L, d, r]``
holds V0 strictly below the diagonal and T0 on and above it. ``signs [L, r]`` are +1 or -1 and are
not trained.

Sources: Schreiber and Van Loan 1989 (compact WY form), Puglisi 1992 (T from the Gram matrix), Wen
and Yin 2013 (Cayley map of a low-rank skew-symmetric matrix).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.dtypes import accumulation_dtype

PARAMETRIZATIONS = ("householder", "cayley")
MAX_RANK = 256
"""The largest supported rank r."""


class BasePoint(NamedTuple):
    """A base point R0 of a map, prepared by :func:`reft_kernels.base_point`."""

    R: Tensor  # [..., r, d]: the result for X = 0
    reflectors: Tensor  # [..., d, r]: V0 strictly below the diagonal, T0 on and above it
    signs: Tensor  # [..., r], +-1


class _Tall(NamedTuple):
    """A ``[L, d, r]`` matrix that consists of ``top`` and the remaining rows of ``whole``.

    This represents a matrix with replaced first rows without a copy.
    """

    top: Tensor  # [L, r, r]: the first r rows
    whole: Tensor  # [L, d, r]: its first r rows are not read

    def transposed_product(self, M: Tensor) -> Tensor:
        """Return (A M)^T ``[L, r, d]`` for this matrix A and M ``[L, r, r]``."""
        out = M.mT @ self.whole.mT
        out[..., : M.shape[-1]] = M.mT @ self.top.mT
        return out

    def left_product(self, Y: Tensor) -> Tensor:
        """Return Y A ``[L, k, r]`` for this matrix A and Y ``[L, k, d]``."""
        r = self.top.shape[-1]
        return Y[..., :r] @ self.top + Y[..., r:] @ self.whole[..., r:, :]


class _Map(NamedTuple):
    """The factors of F = E N + V M, and the inverse that the backward pass reuses."""

    V: _Tall
    M: Tensor  # [L, r, r]
    N: Tensor  # [L, r, r]
    inner: Tensor  # [L, r, r]: T for householder, C for cayley


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _unit_lower(X: Tensor) -> _Tall:
    """Return the unit lower trapezoidal part of X."""
    top = X[..., : X.shape[-1], :].tril(-1)
    top.diagonal(dim1=-2, dim2=-1).fill_(1)
    return _Tall(top, X)


def _below(X: Tensor) -> _Tall:
    """Return [0; X[r:]]."""
    return _Tall(torch.zeros_like(X[..., : X.shape[-1], :]), X)


# Rows per fp32 sum; the sums are added in fp64. A single fp32 sum has an error of 5e-6 at d = 4096
_GRAM_BLOCK = 128


def _gram(A: _Tall, B: _Tall) -> Tensor:
    """Return A^T B ``[L, r, r]`` in fp64.

    The orthonormality error of the result depends on the accuracy of this sum. The first r rows
    contain the unit diagonal, which is large compared with the other entries, so they are summed in
    fp64 throughout.
    """
    r, d = A.whole.shape[-1], A.whole.shape[-2]
    total = A.top.mT.double() @ B.top.double()
    blocks = (d - r) // _GRAM_BLOCK
    body = r + blocks * _GRAM_BLOCK
    if blocks:
        A_blocks, B_blocks = (
            t.whole[:, r:body].unflatten(1, (blocks, _GRAM_BLOCK)) for t in (A, B)
        )
        total = total + (A_blocks.mT @ B_blocks).sum(1, dtype=torch.float64)
    return total if body == d else total + A.whole[:, body:].mT @ B.whole[:, body:]


def _half_diagonal_upper(G: Tensor) -> Tensor:
    """Return striu(G) + diag(G)/2."""
    S = G.triu()
    S.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return S


def _householder_T(V: _Tall) -> Tensor:
    S = _half_diagonal_upper(_gram(V, V))
    # inv_ex does not synchronize; solve_triangular would start a thread pool for an r x r matrix
    return torch.linalg.inv_ex(S).inverse


def _householder_map(X: Tensor, T: Tensor | None = None) -> _Map:
    V = _unit_lower(X)
    T = _householder_T(V) if T is None else T
    return _Map(V, -(T @ V.top.mT.to(T.dtype)), _eye(T), T)


def _cayley_map(X: Tensor, C: Tensor | None = None) -> _Map:
    K = _below(X)
    if C is None:
        lower = X[..., : X.shape[-1], :].tril(-1)
        C = torch.linalg.inv_ex(_eye(X) + (lower - lower.mT) + _gram(K, K)).inverse
    return _Map(K, -2 * C, 2 * C - _eye(C), C)


_MAPS = {"householder": _householder_map, "cayley": _cayley_map}


_AT_ZERO = {"householder": -1, "cayley": 1}  # F(0) is this factor times E


def _column_scale(name: str, signs: Tensor | None, base: Tensor | None) -> Tensor | None:
    """Return the factors of the columns of F, ``[L, 1, r]``, or None if all are 1."""
    if signs is None:
        return None
    return signs.unsqueeze(-2) if base is None else _AT_ZERO[name] * signs.unsqueeze(-2)


def _build(
    name: str,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    point: Tensor | None,
    W: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(X.dtype)
    r = X.shape[-1]
    F = _MAPS[name](X.to(acc))
    scale = _column_scale(name, None if signs is None else signs.to(acc), base)
    M, N = F.M, F.N if base is None else F.N - _AT_ZERO[name] * _eye(F.N)
    if scale is not None:  # scale the [r, r] factors instead of the [d, r] result
        M, N = M * scale, N * scale
    R = F.V.transposed_product(M.to(acc))
    R[..., :r] += N.mT
    if base is None or point is None:
        aux = F.inner.to(acc).unsqueeze(1).contiguous()  # LAPACK returns column-major matrices
    else:
        base = base.to(acc)
        V0, T0 = _unit_lower(base), base[..., :r, :].triu()
        cross = _gram(V0, F.V)
        back = T0.double() @ (cross @ M.double() + V0.top.mT.double() @ N.double())
        R = R.sub_(V0.transposed_product(back.to(acc))).add_(point)
        aux = torch.stack([F.inner, cross], dim=1).to(acc)
    D = W.to(acc) - R if W is not None else R.new_empty(0)
    return R, D, aux


def _build_backward(
    name: str,
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    acc = accumulation_dtype(X.dtype)
    dtype, r = X.dtype, X.shape[-1]
    if grad_R is None and grad_D is None:
        return torch.zeros_like(X)
    grad_R, grad_D = (None if grad is None else grad.to(acc) for grad in (grad_R, grad_D))
    # dL/dF^T [L, r, d] before the column scale
    if grad_R is None:
        assert grad_D is not None
        total = -grad_D
    else:
        total = grad_R if grad_D is None else grad_R - grad_D
    F = _MAPS[name](X.to(acc), aux[:, 0])
    scale = _column_scale(name, None if signs is None else signs.to(acc), base)
    if base is not None:
        base = base.to(acc)
        V0, T0 = _unit_lower(base), base[..., :r, :].triu()
        total = total - V0.transposed_product((V0.left_product(total) @ T0).mT)
    M, Mbar, Nbar = F.M, F.V.left_product(total).mT, total[..., :r].mT
    if scale is not None:
        M, Mbar, Nbar = M * scale, Mbar * scale, Nbar * scale
    if name == "householder":
        T, V1 = F.inner, F.V.top
        Sbar = T.mT @ (Mbar @ V1) @ T.mT
        Gsym = _half_diagonal_upper(Sbar)
        top = Nbar @ F.M.mT - Mbar.mT @ T
    else:
        C = F.inner
        Pbar = -C.mT @ (2 * Nbar - 2 * Mbar) @ C.mT
        Gsym = Pbar
        top = Pbar - Pbar.mT
    Gsym = Gsym + Gsym.mT
    grad_X = (total.mT @ M.mT).baddbmm_(F.V.whole, Gsym)
    grad_X[..., :r, :] = (top + F.V.top @ Gsym).tril(-1)  # V.top is zero for cayley
    return grad_X.to(dtype)


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Householder map; see the module documentation.

    Args:
        X: ``[L, d, r]``.
        signs: ``[L, r]`` or None.
        base: ``[L, d, r]`` or None.
        point: ``[L, r, d]`` with ``base``, else None.
        W: ``[L, r, d]`` or None.

    Returns:
        R ``[L, r, d]``; D = W - R ``[L, r, d]``, empty without ``W``; and aux, which holds T
        ``[L, 1, r, r]``, or T and V0^T V ``[L, 2, r, r]`` with ``base``. All are fp32 (fp64 for
        fp64 ``X``).
    """
    return _build("householder", X, signs, base, point, W)


def householder_backward(
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    """Compute the gradient of X for :func:`householder`.

    Args:
        grad_R: dL/dR ``[L, r, d]`` or None.
        grad_D: dL/dD ``[L, r, d]`` or None. Since D = W - R, it contributes -grad_D to dL/dR.
        X, signs, base: The inputs of the forward pass.
        aux: The third output of the forward pass.

    Returns:
        dL/dX ``[L, d, r]`` in the dtype of ``X``, zero on and above the diagonal.
    """
    return _build_backward("householder", grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the Cayley map.

    Arguments and results are those of :func:`householder`, with C in place of T in ``aux``.
    """
    return _build("cayley", X, signs, base, point, W)


def cayley_backward(
    grad_R: Tensor | None,
    grad_D: Tensor | None,
    X: Tensor,
    signs: Tensor | None,
    base: Tensor | None,
    aux: Tensor,
) -> Tensor:
    """Compute the gradient of X for :func:`cayley`.

    Arguments and results are those of :func:`householder_backward`. The gradient is zero on and
    above the diagonal of ``X[:, :r]``.
    """
    return _build_backward("cayley", grad_R, grad_D, X, signs, base, aux)
