"""Orthonormal rows without d x d matrices: the Householder and Cayley maps, their backward and their inverses.

Both maps send ``X [L, d, r]`` to ``Q [L, d, r]`` with orthonormal columns, R = Q^T, and both are, with E the first r columns
of the identity and ``V`` the ``[d, r]`` matrix each reads off X,

    F(X) = E N + V M                                 M, N: [r, r], functions of the Gram matrix G = V^T V
    householder:  V = unit lower trapezoidal part,   M = T V[:r]^T, N = -I,  T = (striu(G) + diag(G)/2)^-1   (compact WY)
    cayley:       V = [0; X[r:]] = [0; K],           M = -2C, N = 2C - I,    C = (I + S + G)^-1, S = tril(X[:r],-1) - its ^T

so that F(0) = E. Two passes over V: one reduces G, one writes F. Then

    no base:    Q = -F diag(signs) for householder (the product of reflectors H_1 ... H_r E), Q = F diag(signs) for cayley
    with base:  Q = base_point^T + H0 (F - E) diag(signs),   H0 = I - V0 T0 V0^T,   H0 E diag(signs) = base_point^T

which is exactly the base point, bit for bit, at X = 0. ``base [L, d, r]`` packs V0 strictly below the diagonal and T0 on and
above it. ``signs`` are +-1 and never trained. Sources: Schreiber and Van Loan 1989 (compact WY), Puglisi 1992 (T from the Gram
matrix), Wen and Yin 2013 (Cayley map of a low-rank skew matrix).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reft_kernels.dtypes import accumulation_dtype

PARAMETRIZATIONS = ("householder", "cayley")


class BasePoint(NamedTuple):
    """The point R0 around which a map works, prepared once by :func:`base_point`."""

    R: Tensor  # [..., r, d]: X = 0 gives exactly this
    reflectors: Tensor  # [..., d, r]: V0 strictly below the diagonal, T0 on and above it
    signs: Tensor  # [..., r], +-1


class _Map(NamedTuple):
    """F = E N + V M of one map at one X, and what its backward needs."""

    V: Tensor  # [L, d, r]
    M: Tensor  # [L, r, r]
    N: Tensor  # [L, r, r]
    inner: Tensor  # [L, r, r]: T for householder, C for cayley


def _eye(like: Tensor, r: int) -> Tensor:
    return torch.eye(r, dtype=like.dtype, device=like.device)


def _unit_lower(X: Tensor) -> Tensor:
    V = X.tril(-1)
    V.diagonal(dim1=-2, dim2=-1).fill_(1)
    return V


def _below(X: Tensor, r: int) -> Tensor:
    """[0; X[r:]]."""
    K = X.clone()
    K[..., :r, :] = 0
    return K


_GRAM_BLOCK = 128  # rows summed in the working dtype before the fp64 sum: one long fp32 sum loses 5e-6 at d = 4096


def _gram(A: Tensor, B: Tensor) -> Tensor:
    """A^T B ``[L, r, r]`` in fp64: orthonormality is as exact as this.

    The first r rows hold the unit diagonal, next to which the others are small: they are summed in fp64 from the start.
    """
    if A.dtype == torch.float64:
        return A.mT @ B
    r, d = A.shape[-1], A.shape[-2]
    total = A[:, :r].mT.double() @ B[:, :r].double()
    blocks = (d - r) // _GRAM_BLOCK
    body = r + blocks * _GRAM_BLOCK
    if blocks:
        A_blocks, B_blocks = (t[:, r:body].unflatten(1, (blocks, _GRAM_BLOCK)) for t in (A, B))
        total = total + (A_blocks.mT @ B_blocks).sum(1, dtype=torch.float64)
    return total if body == d else total + A[:, body:].mT @ B[:, body:]


def _half_diagonal_upper(G: Tensor) -> Tensor:
    """striu(G) + diag(G)/2."""
    S = G.triu()
    S.diagonal(dim1=-2, dim2=-1).mul_(0.5)
    return S


def _householder_T(V: Tensor) -> Tensor:
    S = _half_diagonal_upper(_gram(V, V))
    # inv_ex checks nothing, hence no synchronisation; a triangular solve wakes a thread pool for this r x r matrix
    return torch.linalg.inv_ex(S).inverse


def _householder_map(X: Tensor, T: Tensor | None = None) -> _Map:
    r = X.shape[-1]
    V = _unit_lower(X)
    T = _householder_T(V) if T is None else T
    return _Map(V, T @ V[..., :r, :].mT.to(T.dtype), -_eye(T, r), T)


def _cayley_map(X: Tensor, C: Tensor | None = None) -> _Map:
    r = X.shape[-1]
    K = _below(X, r)
    if C is None:
        lower = X[..., :r, :].tril(-1)
        C = torch.linalg.inv_ex(_eye(X, r) + (lower - lower.mT) + _gram(K, K)).inverse
    return _Map(K, -2 * C, 2 * C - _eye(C, r), C)


_MAPS = {"householder": _householder_map, "cayley": _cayley_map}


def _build(name: str, X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None):
    acc = accumulation_dtype(X.dtype)
    r = X.shape[-1]
    X = X.to(acc)
    F = _MAPS[name](X)
    N = F.N if base is None else F.N - _eye(F.N, r)
    Q = F.V @ F.M.to(acc)
    Q[..., :r, :] += N
    if base is None:
        scale = None if signs is None else signs.to(acc).unsqueeze(-2)
        if name == "householder":
            scale = -1 if scale is None else -scale
        Q = Q if scale is None else Q * scale
        aux = F.inner.to(acc).unsqueeze(1).contiguous()  # LAPACK leaves columns
    else:
        base = base.to(acc)
        V0, T0 = _unit_lower(base), base[..., :r, :].triu()
        cross = _gram(V0, F.V)
        Q = Q - V0 @ (T0.double() @ (cross @ F.M + V0[..., :r, :].mT.double() @ N)).to(acc)
        Q = point.to(acc).mT + Q * signs.to(acc).unsqueeze(-2)
        aux = torch.stack([F.inner, cross], dim=1).to(acc)
    R = Q.mT.contiguous()
    D = W.to(acc) - R if W is not None else X.new_empty(0)
    return R, D, aux


def _build_backward(
    name: str, grad_R: Tensor | None, grad_D: Tensor | None, X: Tensor, signs: Tensor | None, base: Tensor | None, aux
):
    acc = accumulation_dtype(X.dtype)
    dtype, r = X.dtype, X.shape[-1]
    X = X.to(acc)
    if grad_R is None and grad_D is None:
        return torch.zeros_like(X, dtype=dtype)
    total = grad_R if grad_D is None else (-grad_D if grad_R is None else grad_R - grad_D)
    Fbar = total.to(acc).mT
    if signs is not None:
        Fbar = Fbar * signs.to(acc).unsqueeze(-2)
    F = _MAPS[name](X, aux[:, 0])
    if base is not None:
        base = base.to(acc)
        V0, T0 = _unit_lower(base), base[..., :r, :].triu()
        Fbar = Fbar - V0 @ (T0.mT @ (V0.mT @ Fbar))
    elif name == "householder":
        Fbar = -Fbar
    Mbar, Nbar = F.V.mT @ Fbar, Fbar[..., :r, :]
    if name == "householder":
        T, V1 = F.inner, F.V[..., :r, :]
        Sbar = -T.mT @ (Mbar @ V1) @ T.mT
        Gsym = _half_diagonal_upper(Sbar)
        top = Mbar.mT @ T
    else:
        C = F.inner
        Pbar = -C.mT @ (2 * Nbar - 2 * Mbar) @ C.mT
        Gsym = Pbar
        top = Pbar - Pbar.mT
    grad_X = Fbar @ F.M.mT + F.V @ (Gsym + Gsym.mT)
    if name == "householder":
        grad_X[..., :r, :] += top
    else:
        grad_X[..., :r, :] = top
    return grad_X.tril(-1).to(dtype)


def householder(X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and T (with a base also V0^T V) as ``aux``."""
    return _build("householder", X, signs, base, point, W)


def householder_backward(grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor) -> Tensor:
    """dL/dX ``[L, d, r]``, zero on and above the diagonal; ``grad_D`` counts against R (D = W - R)."""
    return _build_backward("householder", grad_R, grad_D, X, signs, base, aux)


def cayley(X: Tensor, signs: Tensor | None, base: Tensor | None, point: Tensor | None, W: Tensor | None):
    """R ``[L, r, d]`` from X ``[L, d, r]``, D = W - R (empty without W) and C (with a base also V0^T V) as ``aux``."""
    return _build("cayley", X, signs, base, point, W)


def cayley_backward(grad_R, grad_D, X: Tensor, signs: Tensor | None, base: Tensor | None, aux: Tensor) -> Tensor:
    """dL/dX ``[L, d, r]``, zero on and above the diagonal of the top block; ``grad_D`` counts against R (D = W - R)."""
    return _build_backward("cayley", grad_R, grad_D, X, signs, base, aux)
