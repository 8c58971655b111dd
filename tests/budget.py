"""The error budget that every output of every function is checked against.

    err <= 2 * (error of the straightforward PyTorch computation in the same dtypes)
           + eps(dtype of the output) * max|ref|

The reference is autograd of the plain formula in fp64 on the same inputs. The straightforward
computation casts the weights to the hidden state's dtype, as a user would. An error is the largest
absolute difference. For outputs with few elements, the straightforward computation may by chance be
rounded well for one draw of the inputs, so each of the three numbers is the maximum over several
draws of one distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = dict[str, Tensor | None]


class Draw(NamedTuple):
    """One draw of the inputs.

    Attributes:
        inputs: Tensors to differentiate.
        engine, plain: Functions of the inputs as keyword arguments.
    """

    inputs: Inputs
    engine: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def outputs(
    function: Callable[..., Tensor], inputs: Inputs, grad_output: Tensor | None = None
) -> dict[str, Tensor]:
    """Call a function on new leaf tensors.

    Returns:
        The output of ``function(**inputs)`` and, if ``grad_output`` is given, the gradient of each
        input.
    """
    leaves = {
        k: None if t is None else t.detach().clone().requires_grad_() for k, t in inputs.items()
    }
    out = function(**leaves)
    results = {"output": out.detach().clone()}
    if grad_output is not None:
        out.backward(grad_output.to(out.dtype))
        results |= {f"gradient of {k}": leaf.grad for k, leaf in leaves.items() if leaf is not None}
        missing = [k for k, t in results.items() if t is None]
        assert not missing, f"missing: {missing}"
    return results


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return the inputs in another dtype."""
    return {k: None if t is None else t.to(dtype) for k, t in inputs.items()}


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def check(
    make: Callable[[], Draw], dtype: torch.dtype, *, draws: int = 8, backward: bool = True
) -> None:
    """Check a function against the error budget.

    Args:
        make: Returns a draw of the inputs.
        dtype: Dtype of the straightforward computation.
        draws: Number of draws.
        backward: Check gradients, too.
    """
    errors: dict[str, list[tuple[float, float, float]]] = {}
    eps: dict[str, float] = {}
    for _ in range(draws):
        inputs, engine, plain = make()
        exact = cast(inputs, torch.float64)
        grad_output = None
        if backward:
            like = plain(**exact)
            grad_output = torch.randn(like.shape, dtype=torch.float64, device=like.device).to(dtype)
        ref = outputs(plain, exact, grad_output)
        ours = outputs(engine, inputs, grad_output)
        theirs = outputs(
            lambda plain=plain, **leaves: plain(**cast(leaves, dtype)), inputs, grad_output
        )
        assert ours.keys() == ref.keys()
        for name, want in ref.items():
            got = ours[name]
            assert got.shape == want.shape, (
                f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            )
            assert got.isfinite().all(), f"{name} is not finite"
            errors_of_draw = (
                _largest(got.double() - want),
                _largest(theirs[name].double() - want),
                _largest(want),
            )
            errors.setdefault(name, []).append(errors_of_draw)
            eps[name] = torch.finfo(got.dtype).eps
    for name, by_draw in errors.items():
        error, straightforward, size = (max(column) for column in zip(*by_draw, strict=True))
        allowed = 2 * straightforward + eps[name] * size
        assert allowed < float("inf"), (
            f"{name}: the straightforward computation is not finite, so there is no bound"
        )
        assert error <= allowed, (
            f"{name}: {error:.2e} over the budget {allowed:.2e} (straightforward: "
            f"{straightforward:.2e})"
        )
