"""R stays orthonormal in fp32: max |R R^T - I| <= 1e-6.

At d = 8192, through 10,000 AdamW steps with weight decay, and through saving, loading and resuming.
"""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch

import reft_kernels as rk

NAMES = ["householder", "cayley"]


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("name", NAMES)
def test_at_d_8192(name, r, scale):
    with rk.backend("torch"):
        assert rk.orthonormality_error(getattr(rk, name)(scale * torch.randn(8192, r))) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_around_a_base_point_at_d_8192(name):
    with rk.backend("torch"):
        base = rk.base_point(rk.householder(torch.randn(8192, 16)))
        for scale in (0.0, 1e-3, 1.0):
            assert (
                rk.orthonormality_error(getattr(rk, name)(scale * torch.randn(8192, 16), base))
                <= 1e-6
            )


def _train(module, optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    d = module.embed_dim
    target = torch.randn(d, d, generator=generator) / d**0.5
    for _ in range(steps):
        x = torch.randn(4, d, generator=generator)
        optimizer.zero_grad()
        (module(x) - x @ target).pow(2).mean().backward()
        optimizer.step()


def _optimizer(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)


@pytest.mark.parametrize(
    ("d", "r", "steps"),
    [(24, 4, 10_000), pytest.param(1024, 16, 10_000, marks=[pytest.mark.full, pytest.mark.slow])],
)
@pytest.mark.parametrize("name", NAMES)
def test_through_training_saving_loading_and_resuming(name, d, r, steps, tmp_path):
    module = rk.LoReFT(d, r, parametrization=name)
    start = module.R.detach().clone()
    optimizer = _optimizer(module)
    _train(module, optimizer, steps, seed=1)
    assert rk.orthonormality_error(module.R) <= 1e-6
    assert (module.R - start).abs().max() > 0.05  # training changes R

    safetensors.torch.save_file(module.state_dict(), tmp_path / "module.safetensors")
    state = copy.deepcopy(optimizer.state_dict())
    loaded = rk.LoReFT(d, r, parametrization=name)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "module.safetensors"))
    assert torch.equal(loaded.R, module.R)
    resumed = _optimizer(loaded)
    resumed.load_state_dict(state)
    _train(module, optimizer, 100, seed=2)
    _train(loaded, resumed, 100, seed=2)
    assert rk.orthonormality_error(loaded.R) <= 1e-6
    assert torch.equal(loaded.R, module.R)
