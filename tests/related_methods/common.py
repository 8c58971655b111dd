"""Error budget of a module: its parameters are differentiated along with the hidden state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests import budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draws(backend: str, device: str) -> int:
    """Return the number of draws: an output of one element may be rounded well by chance."""
    return 6


def check(
    make: Callable[[], tuple[nn.Module, dict[str, Tensor], dict, Callable[..., Tensor]]],
    dtype: torch.dtype,
    *,
    inplace: bool = False,
    draws: int,
) -> None:
    """Check a module against the error budget.

    Args:
        make: Returns a module, its differentiable inputs (the first is edited), other arguments,
            and the plain formula, which takes the inputs and the module's parameters by name.
    """

    def draw() -> budget.Draw:
        module, inputs, fixed, formula = make()
        parameters = {k: p.detach().clone() for k, p in module.named_parameters()}
        names = list(inputs)

        def engine(**leaves):
            given = [leaves.pop(name) for name in names]
            given[0] = given[0].clone() if inplace else given[0]
            out = torch.func.functional_call(
                module, leaves, tuple(given), {**fixed, "inplace": inplace}
            )
            assert not inplace or out is given[0]
            return out

        return budget.Draw({**inputs, **parameters}, engine, formula)

    budget.check(draw, dtype, draws=draws)


def randomized(module: nn.Module) -> nn.Module:
    """Change every parameter from its initial value, so that none is zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape).to(p))
    return module


def rows(device: str, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
