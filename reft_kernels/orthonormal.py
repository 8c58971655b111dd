"""Orthonormal rows without d x d matrices: the Householder and Cayley maps, their backward and
their inverses.

Both maps send ``X [L, d, r]`` to ``Q [L, d, r]`` with orthonormal columns, R = Q^T, and both are,
with E the first r columns of the identity and ``V`` the ``[d, r]`` matrix each reads off X,

    F(X) = E N + V M                                 M, N: [r, r], functions of the Gram matrix G =
                                                     V^T V
    householder:  V = unit lower trapezoidal part,   M = -T V[:r]^T, N = I,  T = (striu(G) +
                  diag(G)/2)^-1   (compact WY)
    cayley:       V = [0; X[r:]] = [0; K],           M = -2C, N = 2C - I,    C = (I + S + G)^-1, S =
                  tril(X[:r],-1) - its ^T

so that householder's F is the product of reflectors H_1 ... H_r E with F(0) = -E, and cayley's F(0)
= E. Two passes over V:
one reduces G, one writes F. Then

    no base:    Q = F diag(signs)
    with base:  Q = base_point^T + H0 (F - F(0)) F(0)[:r] diag(signs),   H0 = I - V0 T0 V0^T,   H0 E
                diag(signs) = base_point^T

which is exactly the base point, bit for bit, at X = 0. ``base [L, d, r]`` packs V0 strictly below
the diagonal and T0 on and above it. ``signs`` are +-1 and never trained. Sources: Schreiber and Van
Loan 1989 (compact WY), Puglisi 1992 (T from the Gram matrix), Wen and Yin 2013 (Cayley map of a
low-rank skew matrix).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.dtypes import accumulation_dtype

PARAMETRIZATIONS = ("householder", "cayley")
MAX_RANK = 256
"""The largest r that the kernels serve."""


class BasePoint(NamedTuple):
    """The point R0 around which a map works, prepared once by :func:`base_point`."""

    R: Tensor  # [..., r, d]: X = 0 gives exactly this
    reflectors: Tensor  # [..., d, r]: V0 strictly below the diagonal, T0 on and above it
    signs: Tensor  # [..., r], +-1


class _Tall(NamedTuple):
    """A ``[L, d, r]`` matrix given as another whose first r rows are replaced: nothing of its
    size is copied.
    """

    top: Tensor  # [L, r, r]
    whole: Tensor  # [L, d, r]; its first r rows are not read

    def transposed_product(self, M: Tensor) -> Tensor:
        """(A M)^T ``[L, r, d]`` for M ``[L, r, r]``."""
        out = M.mT @ self.whole.mT
        out[..., : M.shape[-1]] = M.mT @ self.top.mT
        return out

    def left_product(self, Y: Tensor) -> Tensor:
        """Y A ``[L, k, r]`` for Y ``[L, k, d]``."""
        r = self.top.shape[-1]
        return Y[..., :r] @ self.top + Y[..., r:] @ self.whole[..., r:, :]


class _Map(NamedTuple):
    """F = E N + V M of one map at one X, and what its backward needs."""

    V: _Tall
    M: Tensor  # [L, r, r]
    N: Tensor  # [L, r, r]
    inner: Tensor  # [L, r, r]: T for householder, C for cayley


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _unit_lower(X: Tensor) -> _Tall:
    """The unit lower trapezoidal part."""
    top = X[..., : X.shape[-1], :].tril(-1)
    top.diagonal(dim1=-2, dim2=-1).fill_(1)
    return _Tall(top, X)


def _below(X: Tensor) -> _Tall:
    """[0; X[r:]]."""
    return _Tall(torch.zeros_like(X[..., : X.shape[-1], :]), X)


# rows summed in the working dtype before the fp64 sum: one long fp32 sum loses 5e-6 at d = 4096
_GRAM_BLOCK = 128


def _gram(A: _Tall, B: _Tall) -> Tensor:
    """A^T B ``[L, r, r]`` in fp64: orthonormality is as exact as this.

    The first r rows hold the unit diagonal, next to which the others are small: they are summed in
    fp64 from the start.
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
    """striu(G) + diag(G)/2."""
    S = G.triu()
    S.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return S


def _householder_T(V: _Tall) -> Tensor:
    S = _half_diagonal_upper(_gram(V, V))
    # inv_ex checks nothing, hence no synchronisation; a triangular solve wakes a thread pool for
    # this r x r matrix
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


_AT_ZERO = {"householder": -1, "cayley": 1}  # F(0) = this times E


def _column_scale(name: str, signs: Tensor | None, base: Tensor | None) -> Tensor | None:
    """What multiplies the columns of F; None for nothing."""
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
):
    acc = accumulation_dtype(X.dtype)
    r = X.shape[-1]
    F = _MAPS[name](X.to(acc))
    scale = _column_scale(name, None if signs is None else signs.to(acc), base)
    M, N = F.M, F.N if base is None else F.N - _AT_ZERO[name] * _eye(F.N)
    if scale is not None:  # into the r x r factors: no further pass over [d, r]
        M, N = M * scale, N * scale
    R = F.V.transposed_product(M.to(acc))
    R[..., :r] += N.mT
    if base is None:
        aux = F.inner.to(acc).unsqueeze(1).contiguous()  # LAPACK leaves columns
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
    aux,
):
    acc = accumulation_dtype(X.dtype)
    dtype, r = X.dtype, X.shape[-1]
    if grad_R is None and grad_D is None:
        return torch.zeros_like(X)
    grad_R, grad_D = (None if grad is None else grad.to(acc) for grad in (grad_R, grad_D))
    # [L, r, d], dL/dF^T before the column scale
    total = grad_R if grad_D is None else (-grad_D if grad_R is None else grad_R - grad_D)
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
    grad_X[..., :r, :] = (top + F.V.top @ Gsym).tril(-1)  # cayley's top of V is zero
    return grad_X.to(dtype)


def householder(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and T (with a base also
    V0^T V) as ``aux``.
    """
    return _build("householder", X, signs, base, point, W)


def householder_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]``, zero on and above the diagonal; ``grad_D`` counts against R (D = W -
    R).
    """
    return _build_backward("householder", grad_R, grad_D, X, signs, base, aux)


def cayley(
    X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None
):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and C (with a base also
    V0^T V) as ``aux``.
    """
    return _build("cayley", X, signs, base, point, W)


def cayley_backward(
    grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor
) -> Tensor:
    """dL/dX ``[L, d, r]``, zero on and above the diagonal of the top block; ``grad_D`` counts
    against R (D = W - R).
    """
    return _build_backward("cayley", grad_R, grad_D, X, signs, base, aux)
