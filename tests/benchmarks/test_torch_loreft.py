"""The plain implementation: the identity at the start, the formula, an orthonormal R."""

from __future__ import annotations

import torch

import reft_kernels
from benchmarks.torch_loreft import TorchLoReFT


def rotation(rank: int = 3, width: int = 24) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, rank)).Q.T


def test_edit_starts_as_the_identity_and_is_the_formula():
    torch.manual_seed(0)
    edit, hidden = TorchLoReFT(rotation()), torch.randn(5, 24)
    torch.testing.assert_close(edit(hidden), hidden, rtol=0, atol=1e-6)
    with torch.no_grad():
        edit.source.weight.normal_()
        edit.source.bias.normal_()
    R, W, b = edit.rotate.weight, edit.source.weight, edit.source.bias
    torch.testing.assert_close(edit(hidden), hidden + (hidden @ W.T + b - hidden @ R.T) @ R)
    torch.testing.assert_close(
        edit(hidden), reft_kernels.loreft(hidden, R.contiguous(), W, b), rtol=1e-5, atol=1e-5
    )


def test_given_rotation_is_kept_and_stays_orthonormal_in_training():
    torch.manual_seed(0)
    start = rotation()
    edit = TorchLoReFT(start)
    torch.testing.assert_close(edit.rotate.weight, start, rtol=0, atol=1e-6)
    optimizer = torch.optim.AdamW(edit.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        edit(torch.randn(6, 24)).square().sum().backward()
        optimizer.step()
    R = edit.rotate.weight
    assert (R - start).abs().max() > 1e-2
    torch.testing.assert_close(R @ R.T, torch.eye(3), rtol=0, atol=1e-5)
