"""Training with reft_kernels follows training with plain PyTorch.

Both train the same frozen four-layer model with LoReFT after each layer, from the same X, W and b
on the same batches: reft_kernels with its stacked module, PyTorch with
``torch.linalg.householder_product`` and plain formulas. The same PyTorch training in fp64 is the
reference. At each step and for each final parameter, the error of reft_kernels may be at most twice
the largest error of PyTorch in fp32 so far, plus eps * max|reference|.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reft_kernels as rk
from reft_kernels.interventions import StackedLoReFT
from tests import plain

LAYERS, D, R, STEPS = 4, 32, 4, 50


class Frozen(nn.Module):
    """Four residual MLP layers. ``edit(i, hidden)`` runs after layer i."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))
            for _ in range(LAYERS)
        )
        self.requires_grad_(False)

    def forward(self, x, edit):
        for i, layer in enumerate(self.layers):
            x = edit(i, x + layer(x))
        return x


def _batches(dtype):
    generator = torch.Generator().manual_seed(7)
    target = torch.randn(D, D, generator=generator).to(dtype) / D**0.5
    for _ in range(STEPS):
        x = torch.randn(3, 8, D, generator=generator)
        lengths = torch.randint(1, 9, (3,), generator=generator)
        yield x.to(dtype), x.to(dtype) @ target, rk.positions.resolve("f2+l2", lengths, 8)


def _train(model, parameters, edits, dtype):
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3, weight_decay=0.01, foreach=False)
    losses = []
    for x, y, rows in _batches(dtype):
        optimizer.zero_grad()
        loss = (model(x, edits(rows)) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses), {k: p.detach().double() for k, p in parameters.items()}


def _by_pytorch(model, start, dtype):
    model = model.to(dtype)
    parameters = {k: nn.Parameter(t.to(dtype, copy=True)) for k, t in start.items() if k != "signs"}
    signs = start["signs"].to(dtype)

    def edits(rows):
        rows = rows[rows >= 0].long()

        def edit(i, hidden):
            R_ = plain.householder(parameters["X"][i], signs[i])
            flat = hidden.reshape(-1, D)
            x = flat[rows]
            y = x + (x @ parameters["W"][i].mT + parameters["b"][i] - x @ R_.mT) @ R_
            return flat.index_copy(0, rows, y).view(hidden.shape)

        return edit

    return _train(model, parameters, edits, dtype)


def _by_engine(model, start, inplace):
    module = StackedLoReFT(LAYERS, D, R)
    module.load_state_dict(start)

    def edits(rows):
        built = module()
        return lambda i, hidden: module.edit(hidden, built[i], rows=rows, inplace=inplace)

    return _train(model.float(), dict(module.named_parameters()), edits, torch.float32)


@pytest.mark.parametrize("init", ["orthogonal", "identity"])
@pytest.mark.parametrize("inplace", [False, True])
def test_fifty_steps(inplace, init):
    torch.manual_seed(0)
    model = Frozen()
    start = {k: t.clone() for k, t in StackedLoReFT(LAYERS, D, R, init=init).state_dict().items()}
    losses, final = _by_pytorch(model, start, torch.float64)
    eager_losses, eager_final = _by_pytorch(model, start, torch.float32)
    with rk.backend("torch"):
        our_losses, our_final = _by_engine(model, start, inplace)
    eps = torch.finfo(torch.float32).eps
    noise = (eager_losses - losses).abs().cummax(0).values
    assert ((our_losses - losses).abs() <= 2 * noise + eps * losses.abs()).all()
    assert losses[-5:].mean() < 0.97 * losses[:5].mean()  # the loss decreases
    for key, truth in final.items():
        allowed = 2 * (eager_final[key] - truth).abs().max() + eps * truth.abs().max()
        assert (our_final[key] - truth).abs().max() <= allowed, key
        assert (truth - start[key]).abs().max() > 1e-3, key
