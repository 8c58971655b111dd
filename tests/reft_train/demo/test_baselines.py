"""The plain implementation: its rows, the identity at the start, an orthonormal R, one hook for
each layer.
"""

from __future__ import annotations

import pytest
import torch
from reft_train.demo.baselines import TorchLoReFT, add_hooks
from reft_train.pooling import MeanPooledClassifier
from transformers import AutoModel

import reft_kernels


@pytest.fixture
def mask():
    lengths = torch.tensor([9, 4, 1, 7])
    return (torch.arange(9) < lengths.unsqueeze(1)).long()


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


@pytest.fixture
def hooked(tiny_model):
    torch.manual_seed(0)
    model = MeanPooledClassifier(AutoModel.from_pretrained(tiny_model).eval(), 4, seed=0)
    add_hooks(model, [0, 1], torch.stack([rotation(), rotation()]), "f1+l1")
    return model


def test_the_hooks_have_no_effect_at_the_start(hooked, mask):
    ids = torch.randint(5, 20, mask.shape)
    given = hooked(input_ids=ids, attention_mask=mask).logits
    for layer in hooked.encoder.encoder.layer:
        layer._forward_hooks.clear()
    torch.testing.assert_close(
        given, hooked(input_ids=ids, attention_mask=mask).logits, rtol=1e-5, atol=1e-6
    )


def test_only_selected_rows_change(hooked, mask):
    with torch.no_grad():
        hooked.edits[1].source.bias.fill_(1.0)
    seen = {}
    layer = hooked.encoder.encoder.layer[1]
    layer.register_forward_hook(
        lambda module, args, output: seen.update(after=output), prepend=False
    )
    layer.register_forward_hook(
        lambda module, args, output: seen.update(before=output), prepend=True
    )
    hooked(input_ids=torch.randint(5, 20, mask.shape), attention_mask=mask)
    changed = (seen["after"] != seen["before"]).any(-1).flatten().nonzero().squeeze(1)
    assert changed.tolist() == [0, 8, 9, 12, 27, 33]  # a row of one token has its first alone


def test_gradients_reach_every_edit_and_the_head_alone(hooked, mask):
    hooked(input_ids=torch.randint(5, 20, mask.shape), attention_mask=mask).logits.sum().backward()
    trainable = [name for name, p in hooked.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(
        name for name, p in hooked.named_parameters() if p.grad is not None
    )
    assert not any("encoder" in name for name in trainable) and len(trainable) == 2 * 3 + 2
