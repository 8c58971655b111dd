"""The tiny models that other tests train."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

KINDS = ("tiny_llama", "tiny_t5", "tiny_bert")


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_survives_the_tokenizer(kind, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(kind))
    text = "Größe: 3 × 4, \n\tthe correct answer is true"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer.pad_token_id is not None


def test_special_tokens_stand_where_the_models_expect_them(tiny_llama, tiny_t5, tiny_bert):
    llama, t5, bert = (
        AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, tiny_t5, tiny_bert)
    )
    assert (
        llama("a").input_ids[0] == llama.bos_token_id
        and llama("a").input_ids[-1] != llama.eos_token_id
    )
    assert t5("a").input_ids[-1] == t5.eos_token_id
    pair = bert("a", "b")
    assert pair.token_type_ids == [0, 0, 0, 1, 1] and pair.input_ids[0] == bert.cls_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_model_loads_with_finite_weights(kind, request):
    model = AutoModel.from_pretrained(request.getfixturevalue(kind))
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
