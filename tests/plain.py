"""The edit functions in plain PyTorch, differentiated by autograd.

They are the reference of the tests. Every tensor is used in its own dtype; :mod:`tests.budget`
selects the dtypes.
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
    """A public edit function with the names and roles of its weights."""

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
    """Apply ``formula(x, coeff, weights)`` to the selected rows.

    With weight sets, it is applied set by set to the rows of each set.
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
    for mask, set_weights in groups:
        selected = rows[mask]
        x = flat[selected]
        edited = formula(x, None if coeff is None else coeff[mask], set_weights)
        out = out.index_copy(0, selected, edited)
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
    """Compute one of the edits, out of place."""
    member = MEMBERS[name]

    def formula(x, coeff, weights):
        read = 0.0 if member.read is None else x @ weights[member.read].mT
        u = ACT[activation](read + weights[member.read_bias])
        if member.subtract_projection:
            projected = x @ weights[member.write].mT
            if member.subtract_bias in weights:
                projected = projected + weights[member.subtract_bias]
            u = u - projected
        u = u.expand(x.shape[0], -1) if coeff is None else u * coeff
        return x + u @ weights[member.write]

    return _on_rows(hidden, rows, weight_ids, coeff, weights, formula)


def red(
    hidden: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    rows: Tensor | None = None,
    weight_ids: Tensor | None = None,
) -> Tensor:
    """Compute RED, out of place."""
    weights = {"scale": scale, "bias": bias}
    return _on_rows(
        hidden, rows, weight_ids, None, weights, lambda x, _, w: w["scale"] * x + w["bias"]
    )


def householder(X: Tensor, signs: Tensor | None = None) -> Tensor:
    """Build R by ``torch.linalg.householder_product``, as PyTorch's parametrization does."""
    A = X.tril(-1) + torch.eye(*X.shape[-2:], dtype=X.dtype, device=X.device)
    Q = torch.linalg.householder_product(A, 2.0 / (A * A).sum(-2))
    return Q.mT if signs is None else Q.mT * signs.unsqueeze(-1)


def cayley(X: Tensor, signs: Tensor | None = None) -> Tensor:
    """Build R as the first r columns of the d x d Cayley transform (I - Z)(I + Z)^-1."""
    d, r = X.shape[-2:]
    lower = F.pad(X.tril(-1), (0, d - r))
    Z = lower - lower.mT
    identity = torch.eye(d, dtype=X.dtype, device=X.device)
    Q = torch.linalg.solve(identity + Z, identity - Z)[..., :r]
    return Q.mT if signs is None else Q.mT * signs.unsqueeze(-1)


MAPS: dict[str, Callable] = {"householder": householder, "cayley": cayley}
