"""The family as a user would write it in PyTorch, differentiated by autograd: what the engine is
measured against.

Every tensor is taken in the dtype in which it comes; :mod:`tests.budget` chooses the dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import reft_kernels as rk
from reft_kernels.activations import ACTIVATIONS

ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
assert tuple(ACT) == ACTIVATIONS


class Member(NamedTuple):
    """One public function: how the engine names its weights and which role each plays."""

    function: Callable
    read: str | None
    read_bias: str | None
    write: str | None
    subtract_projection: bool = False
    subtract_bias: str | None = None

    @property
    def matrices(self) -> list[str]:
        return [name for name in (self.write, self.read) if name is not None]

    @property
    def vectors(self) -> list[str]:
        return [name for name in (self.read_bias, self.subtract_bias) if name is not None]


MEMBERS: dict[str, Member] = {
    "loreft": Member(rk.loreft, "W", "b", "R", subtract_projection=True),
    "direft": Member(rk.direft, "W", "b", "R"),
    "nodireft": Member(rk.nodireft, "W1", "b", "W2"),
    "noreft": Member(rk.noreft, "W1", "b", "W2", subtract_projection=True, subtract_bias="b2"),
    "consreft": Member(rk.consreft, None, "s", "R", subtract_projection=True),
    "lobireft": Member(rk.lobireft, None, "s", "R"),
}


def _on_rows(
    hidden: Tensor,
    rows: Tensor | None,
    weight_ids: Tensor | None,
    coeff: Tensor | None,
    weights: dict[str, Tensor],
    formula: Callable,
) -> Tensor:
    """``formula(x, coeff, weights)`` on the selected rows; with sets, set by set on the rows
    that use it.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = torch.arange(flat.shape[0], device=flat.device) if rows is None else rows.long()
    groups = [(rows >= 0, weights)]
    if weight_ids is not None:
        count = next(iter(weights.values())).shape[0]
        groups = [
            ((rows >= 0) & (weight_ids == s), {name: w[s] for name, w in weights.items()})
            for s in range(count)
        ]
    out = flat
    for chosen, own in groups:
        where = rows[chosen]
        out = out.index_copy(
            0, where, formula(flat[where], None if coeff is None else coeff[chosen], own)
        )
    return out.reshape(hidden.shape)


def edit(
    name: str,
    hidden: Tensor,
    weights: dict[str, Tensor],
    *,
    rows: Tensor | None = None,
    activation: str = "linear",
    coeff: Tensor | None = None,
    weight_ids: Tensor | None = None,
) -> Tensor:
    """The formula of one member of the family, out of place."""
    member = MEMBERS[name]

    def formula(x, coeff, own):
        read = 0.0 if member.read is None else x @ own[member.read].mT
        u = ACT[activation](read + own[member.read_bias])
        if member.subtract_projection:
            projected = x @ own[member.write].mT
            u = u - (
                projected + own[member.subtract_bias] if member.subtract_bias in own else projected
            )
        u = u.expand(x.shape[0], -1) if coeff is None else u * coeff
        return x + u @ own[member.write]

    return _on_rows(hidden, rows, weight_ids, coeff, weights, formula)


def red(
    hidden: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    weight_ids: Tensor | None = None,
) -> Tensor:
    """RED's formula, out of place."""
    weights = {"scale": scale, "bias": bias}
    return _on_rows(
        hidden, rows, weight_ids, None, weights, lambda x, _, own: own["scale"] * x + own["bias"]
    )


def householder(X: Tensor, signs: Tensor | None = None) -> Tensor:
    """R by ``torch.linalg.householder_product``, as
    ``torch.nn.utils.parametrizations.orthogonal`` calls it.
    """
    A = X.tril(-1) + torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device)
    Q = torch.linalg.householder_product(A, 2.0 / (A * A).sum(-2))
    return Q.mT if signs is None else Q.mT * signs.unsqueeze(-1)


def cayley(X: Tensor, signs: Tensor | None = None) -> Tensor:
    """R by the d x d Cayley transform (I - Z)(I + Z)^-1 and its first r columns."""
    d, r = X.shape[-2:]
    lower = F.pad(X.tril(-1), (0, d - r))
    Z = lower - lower.mT
    identity = torch.eye(d, dtype=X.dtype, device=X.device)
    Q = torch.linalg.solve(identity + Z, identity - Z)[..., :r]
    return Q.mT if signs is None else Q.mT * signs.unsqueeze(-1)


MAPS: dict[str, Callable] = {"householder": householder, "cayley": cayley}
