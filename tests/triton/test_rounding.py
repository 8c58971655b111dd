"""Roundings of the backward kernels that Triton's interpreter does not execute.

The interpreter replaces products of bf16 terms by exact ones. Here the kernels' arithmetic on
terms is written in plain PyTorch, with every rounding where the kernels have it, and is held to the
error budget.
"""

from __future__ import annotations

import pytest
import torch

from tests.triton.roundings import rounded, truncated

D, ROWS = 256, 192


def product(a, b):
    """A product on tensor cores: exact products of terms, fp32 sums."""
    return a @ b


class Kernels:
    """The backward pass of LoReFT over all rows, as the two kernels compute it."""

    def __init__(self, dtype, rank):
        self.dtype, self.stacked = dtype, rank <= 8
        self.exact = dtype != torch.bfloat16  # EXACT of gradient_kernel

    def delta(self, g, write):
        if self.dtype == torch.bfloat16:
            high, low = truncated(write)
        else:
            high = write.to(self.dtype).float()
            low = (write - high).to(self.dtype).float()
        return product(g, high.T) + product(g, low.T)

    def outer(self, v, x):
        high, low = rounded(v)
        if self.dtype == torch.float16:
            x_high, x_low = truncated(x)
            total = product(high.T, x_high) + product(high.T, x_low) + product(low.T, x_high)
            return total + product(low.T, x_low) if self.stacked else total
        return product(high.T, x) + product(low.T, x)

    def expand(self, v, w, exact):
        high, low = rounded(v)
        w_high, w_low = rounded(w)
        total = product(high, w_high)
        if self.stacked:
            total += product(low, w_high)
        if exact:
            total += product(high, w_low)
            total += product(low, w_low) if self.stacked else product(low, w_high)
        return total

    def subtract(self, acc, v, w):
        high, low = truncated(-v)
        w_high, w_low = rounded(w)
        return acc + product(high, w_high) + product(low, w_high) + product(high, w_low)

    def backward(self, g, y, u, read, write):
        g, y = g.float(), y.float()
        dz = self.delta(g, write)
        dh = (g + self.expand(dz, read - write, self.exact)).to(self.dtype)
        if self.stacked:
            used_high, used_low = rounded(u)
            dz_high, dz_low = rounded(dz)
            gram = product((dz_high + dz_low).T, used_high + used_low)
            d_read = self.subtract(self.outer(dz, y), gram, write)
        else:
            x = (y - self.expand(u, write, True)).to(self.dtype).float()
            d_read = self.outer(dz, x)
        return {"dh": dh, "dA": d_read, "dB": self.outer(u, g) - d_read}


def straightforward(h, g, read, bias, write):
    """Autograd of the formula with everything in the hidden states' dtype."""
    dtype = h.dtype
    h, read, bias, write = (t.detach().to(dtype).requires_grad_() for t in (h, read, bias, write))
    y = h + (h @ read.T + bias - h @ write.T) @ write
    return dict(zip(("dh", "dA", "dB"), torch.autograd.grad(y, (h, read, write), g), strict=True))


def reference_from_output(y, u, g, read, write):
    """The gradients in fp64 on the kernels' inputs: without rows, y is saved and not h."""
    y, u, g, read, write = (t.double() for t in (y, u, g, read, write))
    dz = g @ write.T
    d_read = dz.T @ (y - u @ write)
    return {"dh": g + dz @ (read - write), "dA": d_read, "dB": u.T @ g - d_read}


@pytest.mark.parametrize("size", [0.3, 1.0, 5.0], ids=lambda s: f"edit={s}h")
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_terms_hold_the_error_budget(dtype, rank, size):
    """Edits from a third of h to five times h."""
    totals = {}
    for seed in range(4):
        torch.manual_seed(seed)
        h, g = (torch.randn(ROWS, D).to(dtype) for _ in range(2))
        write = torch.linalg.qr(torch.randn(D, rank))[0].T.contiguous()
        read = write + size * (D / rank) ** 0.5 * torch.randn(rank, D) / D**0.5
        bias = torch.randn(rank)
        u = h.float() @ (read - write).T + bias
        y = (h.float() + u @ write).to(dtype)
        ours = Kernels(dtype, rank).backward(g, y, u, read, write)
        naive = straightforward(h, g, read, bias, write)
        exact = reference_from_output(y, u, g, read, write)
        for name, want in exact.items():
            numbers = (
                (ours[name].double() - want).abs().max(),
                (naive[name].double() - want).abs().max(),
                want.abs().max(),
            )
            totals.setdefault(name, []).append([float(n) for n in numbers])
    for name, results in totals.items():
        error, theirs, largest = (max(column) for column in zip(*results, strict=True))
        eps = torch.finfo(dtype if name == "dh" else torch.float32).eps
        allowed = 2 * theirs + eps * largest
        assert error <= allowed, (
            f"{name}: {error:.2e} over the budget {allowed:.2e} (straightforward {theirs:.2e})"
        )
