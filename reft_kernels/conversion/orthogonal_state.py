"""The state of ``torch.nn.utils.parametrizations.orthogonal``: a parameter ``original`` and a d x d
``base``, and R from them.

For a tall weight [d, r] it is  Q = base @ H(original),  with H the product of r Householder
                                reflectors (the matrix exponential
where r = d); ``original = -E`` gives H = E, so that Q is the first r columns of ``base``, bit for
bit. A wide weight [r, d] is
stored and evaluated transposed. Source: the parametrization's own code in PyTorch, of which
:func:`evaluate` is the forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reft_kernels.conversion.common import ConversionError

ORIGINAL = "parametrizations.weight.original"
BASE = "parametrizations.weight.0.base"


def _minus_identity(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return -torch.eye(rows, columns, dtype=dtype)


def _tall(original: Tensor) -> Tensor:
    return original.mT if original.shape[0] < original.shape[1] else original


def _householder(X: Tensor) -> Tensor:
    A = X.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (A * A).sum(dim=-2))
    return torch.linalg.householder_product(A, tau) * X.diagonal().int().unsqueeze(-2)


def evaluate(original: Tensor, base: Tensor, where: str) -> Tensor:
    """The weight that the parametrization shows: [d, r] for a tall ``original``, [r, d] for a wide
    one, in its dtype.

    Args:
        original: ``[d, r]`` or ``[r, d]``. base: ``[d, d]``. where: what to call them in an error.

    Raises:
        ConversionError: shapes or dtypes that do not belong together.
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
        base = (
            base.mT.contiguous().mT
        )  # by columns, as the parametrization holds it: the product's bits depend on it
        Q = base @ (torch.matrix_exp(X.tril() - X.tril().mT) if d == r else _householder(X))
    return (Q if X is original else Q.mT).contiguous()


def state(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(original, base) that show exactly ``weight`` ([d, r] or [r, d], orthonormal): -E, and the
    weight completed to d x d.
    """
    Q = _tall(weight)
    d, r = Q.shape
    full = torch.linalg.qr(Q.double(), mode="complete").Q.to(weight.dtype)
    full[:, :r] = Q
    return _minus_identity(*weight.shape, weight.dtype), full.contiguous()
