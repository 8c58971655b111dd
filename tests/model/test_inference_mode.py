"""Models and functions under ``torch.inference_mode``, whose tensors have no version counter."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import reft_kernels as rk
from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, make, shake


def test_a_model_answers_as_without_gradients_and_trains_afterwards():
    model = get_peft_model(make("llama"), ReftConfig(rank=4))
    shake(model)
    inputs = batch("llama")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, expected)
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.inference_mode()
def test_rows_that_were_changed_are_checked_again():
    hidden, R = torch.randn(4, 16), rk.householder(torch.randn(16, 2))
    edit = (R, torch.randn(2, 16), torch.zeros(2))
    rows = torch.tensor([1, 3], dtype=torch.int32)
    rk.loreft(hidden, *edit, rows=rows)
    rows[0] = 9
    with pytest.raises(ValueError, match="rows: got values from 3 to 9"):
        rk.loreft(hidden, *edit, rows=rows)


@torch.inference_mode()
def test_set_ids_that_were_changed_are_checked_again():
    hidden, R = torch.randn(2, 16), rk.householder(torch.randn(2, 16, 2))
    ids = torch.tensor([0, 1], dtype=torch.int32)
    edit = (R, torch.randn(2, 2, 16), torch.zeros(2, 2))
    rk.loreft(hidden, *edit, weight_ids=ids)
    ids[0] = 2
    with pytest.raises(ValueError, match="weight_ids: got values from 1 to 2"):
        rk.loreft(hidden, *edit, weight_ids=ids)
