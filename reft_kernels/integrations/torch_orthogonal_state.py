"""The state of ``torch.nn.utils.parametrizations.orthogonal`` and its evaluation.

The state consists of a parameter ``original`` and a d x d buffer ``base``. A tall weight ``[d, r]``
is Q = base @ H(original), where H is a product of r Householder reflectors, or the matrix
exponential if r = d. ``original = -E`` gives H = E, so that Q is the first r columns of ``base``,
bit for bit. A wide weight ``[r, d]`` is stored transposed.

Source: PyTorch's implementation of the parametrization, whose forward is :func:`evaluate`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.adapter_files import ConversionError

ORIGINAL = "parametrizations.weight.original"
BASE = "parametrizations.weight.0.base"


def _minus_identity(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return -torch.eye(rows, columns, dtype=dtype)


def _tall(original: Tensor) -> Tensor:
    """Return ``original`` or its transpose, whichever has at least as many rows as columns."""
    return original.mT if original.shape[0] < original.shape[1] else original


def _householder(X: Tensor) -> Tensor:
    A = X.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (A * A).sum(dim=-2))
    return torch.linalg.householder_product(A, tau) * X.diagonal().int().unsqueeze(-2)


def evaluate(original: Tensor, base: Tensor, where: str) -> Tensor:
    """Return the weight of the parametrization.

    Args:
        original: ``[d, r]`` or ``[r, d]``.
        base: ``[d, d]``.
        where: Prefix of error messages.

    Returns:
        The weight, with the shape and dtype of ``original``.

    Raises:
        ConversionError: If the shapes or dtypes are inconsistent.
    """
    if (
        original.dim() != 2
        or base.shape != (max(original.shape), max(original.shape))
        or original.dtype != base.dtype
    ):
        raise ConversionError(
            f"{where}: original {tuple(original.shape)} {original.dtype} and base "
            f"{tuple(base.shape)} {base.dtype} do not "
            "belong together: expected [d, r] or [r, d], and [d, d]"
        )
    X = _tall(original)
    d, r = X.shape
    if torch.equal(X.tril(), _minus_identity(d, r, X.dtype)):
        Q = base[:, :r]
    else:
        # Column-major as in the parametrization, because the rounding of the product depends on it
        base = base.mT.contiguous().mT
        Q = base @ (torch.matrix_exp(X.tril() - X.tril().mT) if d == r else _householder(X))
    return (Q if X is original else Q.mT).contiguous()


def state(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a state whose weight is exactly the given one.

    Args:
        weight: ``[d, r]`` with orthonormal columns, or ``[r, d]`` with orthonormal rows.

    Returns:
        ``original`` = -E with the shape of ``weight``, and ``base [d, d]``, which is the weight
        completed to an orthogonal matrix.
    """
    Q = _tall(weight)
    d, r = Q.shape
    full = torch.linalg.qr(Q.double(), mode="complete").Q.to(weight.dtype)
    full[:, :r] = Q
    rows, columns = weight.shape
    return _minus_identity(rows, columns, weight.dtype), full.contiguous()
