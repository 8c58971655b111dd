"""Questions 1 and 2: what does a LoReFT edit cost, over all rows and over selected ones?

    python -m benchmarks.edit [--quick] [--csv FILE] [--device cpu|cuda]

Forward, and forward + backward, by reft_kernels and by PyTorch (folded: two products, eager and by torch.compile; unfolded:
three), against ``torch.clone`` of the same hidden state, the copy that no kernel beats. Forward + backward between two other
operations, as inside a model: there hidden state and gradient are the graph's own and are edited in place; the baseline is the
same graph without an edit. The selected rows are f7+l7 of each prompt, edited in place, at several sequence lengths. Each
provider is held to fp64 on the same inputs before it is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import reft_kernels
from benchmarks import timing
from reft_kernels import positions


def _weights(d: int, rank: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    R = reft_kernels.householder(torch.randn(d, rank, device=device) / d**0.5)
    return R, R + torch.randn(rank, d, device=device) / d**0.5, torch.randn(rank, device=device)


def _eager_folded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + torch.nn.functional.linear(h, W - R, b) @ R


def _eager_unfolded(h: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    R, W, b = (t.to(h.dtype) for t in (R, W, b))
    return h + (torch.nn.functional.linear(h, W, b) - h @ R.mT) @ R


def _eager_rows(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    """Whole-sequence clone, gather, edit, scatter: what a hook without a fused kernel does."""
    out = h.clone()
    out[rows] = _eager_folded(h[rows], R, W, b)
    return out


def gate(name: str, function: Callable[..., Tensor], hidden: Tensor, weights: tuple[Tensor, ...]) -> None:
    """Refuse to time a provider whose output is not that of the formula.

    Raises:
        RuntimeError: an error beyond what the dtype's own rounding explains.
    """
    h, (R, W, b) = hidden.double(), (w.double() for w in weights)
    exact = h + ((h @ W.mT + b) - h @ R.mT) @ R
    error = float((function(hidden.clone(), *weights).double() - exact).abs().max() / exact.abs().max())
    allowed = 16 * torch.finfo(hidden.dtype).eps
    if error > allowed:
        raise RuntimeError(f"{name}: relative error {error:.1e} against fp64, expected at most {allowed:.1e}")


def _both(function: Callable[..., Tensor], hidden: Tensor, weights: tuple[Tensor, ...], grad: Tensor) -> Callable[[], None]:
    leaves = [hidden.clone().requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)]

    def run() -> None:
        function(*leaves).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def _inside(function: Callable[..., Tensor], hidden: Tensor, weights: tuple[Tensor, ...], grad: Tensor) -> Callable[[], None]:
    leaves = [hidden.clone().requires_grad_(), *(w.detach().clone().requires_grad_() for w in weights)]

    def run() -> None:
        (function(leaves[0] * 1.0, *leaves[1:]) * 1.0).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def all_rows(n: int, d: int, rank: int, dtype: torch.dtype, device: str, rounds: int) -> list[timing.Row]:
    """Forward and forward + backward over all n rows."""
    hidden = torch.randn(n, d, device=device).to(dtype)
    weights, grad = _weights(d, rank, device), torch.randn(n, d, device=device).to(dtype)
    providers = {
        "reft_kernels": reft_kernels.loreft,
        "eager, folded": _eager_folded,
        "eager, unfolded": _eager_unfolded,
        "torch.compile, folded": torch.compile(_eager_folded, dynamic=False),
    }
    for name, function in providers.items():
        gate(name, function, hidden, weights)
    settings = {"shape": f"rows={n} d={d} r={rank}", "dtype": str(dtype)[6:], "device": device, "rounds": rounds}
    with torch.no_grad():
        forward = {name: (lambda f=f: f(hidden, *weights)) for name, f in providers.items()}
        found = timing.compare("edit, all rows, forward", {"clone": hidden.clone, **forward}, "clone", **settings)
    both = {name: _both(f, hidden, weights, grad) for name, f in providers.items()}
    found += timing.compare("edit, all rows, forward + backward", {"clone": hidden.clone, **both}, "clone", **settings)
    providers["reft_kernels"] = functools.partial(reft_kernels.loreft, inplace=True)
    inside = {name: _inside(f, hidden, weights, grad) for name, f in providers.items()}
    baseline = {"no edit": _inside(lambda h, *_: h, hidden, weights, grad)}
    question = "edit inside a model, all rows, forward + backward"
    return found + timing.compare(question, baseline | inside, "no edit", **settings)


def selected_rows(batch: int, d: int, rank: int, dtype: torch.dtype, device: str, rounds: int) -> list[timing.Row]:
    """f7+l7 in place at several sequence lengths, against the same rows alone."""
    weights, found = _weights(d, rank, device), []
    count = batch * 14
    alone = torch.randn(count, d, device=device).to(dtype)
    providers: dict[str, Callable[[], object]] = {"the rows alone": lambda: reft_kernels.loreft(alone, *weights, inplace=True)}
    for length in (128, 512, 2048):
        hidden = torch.randn(batch * length, d, device=device).to(dtype)
        rows = positions.resolve("f7+l7", [length] * batch, length, device=device)
        providers[f"reft_kernels, T={length}"] = lambda h=hidden, r=rows: reft_kernels.loreft(h, *weights, rows=r, inplace=True)
        if length == 512:
            providers["eager, T=512"] = lambda h=hidden, r=rows: _eager_rows(h, *weights, r)
    with torch.no_grad():
        found = timing.compare(
            "edit, selected rows, forward", providers, "the rows alone",
            shape=f"batch={batch} f7+l7 d={d} r={rank}", dtype=str(dtype)[6:], device=device, rounds=rounds,
        )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Cost of a LoReFT edit over all rows and over selected ones.")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    rounds = 3 if args.quick else 15
    n, d, batch = (512, 256, 4) if args.quick else (8192 if args.device == "cuda" else 4096, 4096, 32)
    ranks = (8,) if args.quick else (8, 32)
    for dtype in (torch.float32,) if args.quick else (torch.float32, torch.bfloat16):
        for rank in ranks:
            for rows in (
                all_rows(n, d, rank, dtype, args.device, rounds),
                selected_rows(batch, d, rank, dtype, args.device, rounds),
            ):
                for question in dict.fromkeys(row.question for row in rows):
                    timing.show([row for row in rows if row.question == question])
                if args.csv:
                    timing.append(rows, args.csv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
