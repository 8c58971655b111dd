"""Question 3: what does it cost to build R and its gradient?

    python -m benchmarks.r_build [--quick] [--csv FILE] [--device cpu|cuda]

One forward and backward of R [r, d] by reft_kernels' householder and cayley, against
``torch.nn.utils.parametrizations.orthogonal`` (what pyreft uses), and of 32 layers stacked against one. Before anything is
timed each provider must give orthonormal rows and, for the Householder map, PyTorch's own values and gradient.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import reft_kernels
from benchmarks import timing


def _eager(d: int, rank: int, device: str) -> Callable[[], object]:
    """PyTorch's parametrization with its defaults; the weight is [d, rank] with orthonormal columns."""
    linear = torch.nn.Linear(rank, d, bias=False, device=device)
    torch.nn.utils.parametrizations.orthogonal(linear)
    grad = torch.randn(d, rank, device=device)
    return lambda: linear.weight.backward(grad)


def _engine(function: Callable, layers: int, d: int, rank: int, device: str) -> Callable[[], object]:
    X = (torch.randn(layers, d, rank, device=device) / d**0.5).requires_grad_()
    grad = torch.randn(layers, rank, d, device=device)
    return lambda: function(X).backward(grad)


def gate(d: int, rank: int, device: str) -> None:
    """Refuse to time anything that is wrong.

    Raises:
        RuntimeError: rows that are not orthonormal, or a householder that differs from PyTorch's.
    """
    X = torch.randn(d, rank, dtype=torch.float64) / d**0.5
    G = torch.randn(rank, d, dtype=torch.float64)
    reference = X.clone().requires_grad_()
    lower = reference.tril(-1)
    R = torch.linalg.householder_product(lower, 2 / (1 + lower.square().sum(0))).mT
    R.backward(G)
    for name, function in (("householder", reft_kernels.householder), ("cayley", reft_kernels.cayley)):
        x = X.to(device, torch.float32).requires_grad_()
        built = function(x)
        built.backward(G.to(built))
        error = reft_kernels.orthonormality_error(built)
        if error > 1e-6:
            raise RuntimeError(f"{name}: max |R R^T - I| = {error:.1e}, expected at most 1e-6")
        if name == "householder":
            pairs = (built.detach().cpu(), R.detach()), (x.grad.cpu(), reference.grad)
            wrong = max(float((ours - exact).abs().max()) for ours, exact in pairs)
            if wrong > 1e-5:
                raise RuntimeError(f"{name}: {wrong:.1e} off torch.linalg.householder_product, expected at most 1e-5")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cost of building R, forward and backward.")
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device, rounds = args.device, 3 if args.quick else 11
    for d, rank in ((4096, 8),) if args.quick else ((4096, 8), (4096, 32), (8192, 8)):
        gate(d, rank, device)
        providers = {
            "reft_kernels householder": _engine(reft_kernels.householder, 1, d, rank, device),
            "reft_kernels cayley": _engine(reft_kernels.cayley, 1, d, rank, device),
            "reft_kernels householder, 32 layers": _engine(reft_kernels.householder, 32, d, rank, device),
            "parametrizations.orthogonal": _eager(d, rank, device),
        }
        shape = f"d={d} r={rank}"
        rows = timing.compare(
            "R build, forward + backward", providers, "reft_kernels householder",
            shape=shape, dtype="float32", device=device, rounds=rounds,
        )  # fmt: skip
        timing.show(rows)
        if args.csv:
            timing.append(rows, args.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
