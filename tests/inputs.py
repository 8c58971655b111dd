"""Sample inputs of the edit functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests import budget, plain


class Case(NamedTuple):
    """Parameters of a call. The defaults are small enough for Triton's interpreter."""

    lead: tuple[int, ...] = (2, 6)
    d: int = 21
    r: int = 3
    rows: int | None = None  # number of selected rows; None selects all
    sets: int | None = None
    coeff: bool = False
    inplace: bool = False
    activation: str = "linear"

    def __str__(self) -> str:
        flags = [name for name in ("rows", "sets", "coeff", "inplace") if getattr(self, name)]
        return "-".join([self.activation, *(flags or ["all"])])


def weights(name: str, case: Case, *, dtype=torch.float32, device="cpu") -> dict[str, Tensor]:
    """Return the weights of one function: R orthonormal, the others as in ``nn.Linear``."""
    member = plain.MEMBERS[name]
    lead = () if case.sets is None else (case.sets,)
    tensors = {
        k: torch.randn(*lead, case.r, case.d, dtype=dtype, device=device) / case.d**0.5
        for k in member.matrices
    }
    if "R" in tensors:
        tensors["R"] = torch.linalg.qr(tensors["R"].double().mT).Q.mT.to(dtype).contiguous()
    return tensors | {
        k: 0.1 * torch.randn(*lead, case.r, dtype=dtype, device=device) for k in member.vectors
    }


def rows(total: int, count: int, *, skip: bool = True, device="cpu") -> Tensor:
    """Return ``count`` distinct row numbers in random order.

    With ``skip=True`` the second entry is -1.
    """
    chosen = torch.randperm(total)[:count].to(torch.int32)
    if skip and count > 1:
        chosen[1] = -1
    return chosen.to(device)


def options(case: Case, device="cpu") -> dict:
    """Return the keyword arguments that are not differentiated."""
    total = torch.Size(case.lead).numel()
    count = total if case.rows is None else case.rows
    return {
        "rows": None if case.rows is None else rows(total, case.rows, device=device),
        "weight_ids": None
        if case.sets is None
        else torch.randint(case.sets, (count,), dtype=torch.int32, device=device),
        "activation": case.activation,
    }


def draw(name: str, case: Case, dtype: torch.dtype, device="cpu") -> budget.Draw:
    """Return one draw of a function's inputs.

    The hidden state has ``dtype``. Weights are in fp32, or in fp64 for an fp64 hidden state.
    """
    own = weights(
        name, case, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
    )
    fixed = options(case, device)
    total = torch.Size(case.lead).numel()
    inputs = {"hidden": torch.randn(*case.lead, case.d, device=device).to(dtype), **own}
    if case.coeff:
        count = total if case.rows is None else case.rows
        inputs["coeff"] = torch.rand(
            count, case.r, device=device, dtype=own[plain.MEMBERS[name].write].dtype
        )

    def engine(hidden, coeff=None, **own):
        hidden = hidden.clone() if case.inplace else hidden
        return plain.MEMBERS[name].function(
            hidden, coeff=coeff, inplace=case.inplace, **own, **fixed
        )

    def straightforward(hidden, coeff=None, **own):
        return plain.edit(name, hidden, own, coeff=coeff, **fixed)

    return budget.Draw(inputs, engine, straightforward)
