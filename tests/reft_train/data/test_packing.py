"""Packed rows: examples side by side that do not see one another, with the loss and gradients of
padded ones.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from reft_train.data.collating import (
    FILLING,
    PackingCollator,
    PaddingCollator,
    balanced,
    check_model_packs,
    packed_rows,
)
from reft_train.errors import UserError

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import COMMON, SPECIAL, VOCAB, make, shake

PAD = 0
BOTH = pytest.mark.parametrize("flat", [False, True])


def _items(lengths=(11, 5, 17, 4, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        prompt = 1 + (3 * number) % (length - 1)
        items.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "length": length})
    return items


def _sequences(batch):
    """(ids, labels) of each sequence of a packed batch, cut where the position ids start again."""
    found = []
    for ids, labels, positions in zip(
        batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in zip(starts, starts[1:], strict=False):
            assert positions[start:stop].tolist() == list(range(stop - start))
            found.append((ids[start:stop].tolist(), labels[start:stop].tolist()))
    return found


@BOTH
def test_every_example_is_there_once_with_positions_from_zero(flat):
    items = _items()
    found = _sequences(PackingCollator(16, PAD, flat)(items))
    expected = [(item["input_ids"], item["labels"]) for item in items]
    filling = [sequence for sequence in found if sequence not in expected]
    assert sorted(s for s in found if s in expected) == sorted(expected)
    assert all(set(ids) == {PAD} and set(labels) == {-100} for ids, labels in filling)
    assert not (flat and filling)


def _width(lengths, rows):
    return max(sum(lengths[index] for index in row) for row in rows)


@pytest.mark.parametrize(
    "lengths, rows",
    [
        ([8] * 12, 12),
        ([38, 41, 35, 40, 36, 39, 37, 38] * 4, 16),
        ([9, 3] * 8, 11),
        ([400, 9, 8, 7], 1),
        ([], 0),
    ],
)
def test_rows_are_the_shortest_ones_that_are_full(lengths, rows):
    found = packed_rows(lengths, 512)
    assert len(found) == rows and sorted(index for row in found for index in row) == list(
        range(len(lengths))
    )
    if lengths:
        assert rows * _width(lengths, found) <= (1 + FILLING) * sum(lengths)


def test_rows_are_no_longer_than_asked_for_where_examples_allow_it():
    lengths = [60] * 30
    assert _width(lengths, packed_rows(lengths, 64)) == 60
    assert _width([100, 20, 20], packed_rows([100, 20, 20], 64)) == 100


@BOTH
def test_no_example_learns_its_first_token(flat):
    items = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}]
    labels = sorted(labels for _, labels in _sequences(PackingCollator(5, PAD, flat)(items)))
    assert labels == [[-100, 6], [-100, 8, 9]]


@pytest.mark.parametrize("row_length, rows", [(1, 5), (9, 5), (15, 3), (16, 3), (44, 2), (1000, 2)])
def test_there_are_as_many_rows_as_the_tokens_need(row_length, rows):
    batch = PackingCollator(row_length, PAD)(_items())  # 45 tokens
    assert batch["input_ids"].shape[0] == rows


def test_the_longest_goes_first_into_the_emptiest_row():
    assert balanced([11, 5, 17, 4, 8], 2) == [[2, 1], [0, 4, 3]]


def test_there_is_no_mask_and_no_cache():
    assert set(PackingCollator(16, PAD)(_items())) == {
        "input_ids",
        "labels",
        "position_ids",
        "use_cache",
    }
    assert PackingCollator(16, PAD)(_items())["use_cache"] is False


def test_a_flat_row_tells_flash_attention_its_boundaries():
    batch = PackingCollator(16, PAD, flat=True)(_items((3, 5, 4)))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 8, 12]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 5)


# ---- which models pack


def _qwen2():
    config = transformers.Qwen2Config(
        **COMMON, **SPECIAL, intermediate_size=64, num_key_value_heads=2
    )
    return transformers.Qwen2ForCausalLM(config).eval()


def _reft(family="llama", **settings):
    settings = {"layers": "all", "rank": 4, "positions": "f2+l2"} | settings
    model = get_peft_model(make(family), ReftConfig(**settings))
    shake(model)
    return model


PACKING = {
    name: lambda name=name: make(name) for name in ("llama", "qwen3", "gemma3", "neox", "gpt2")
} | {"qwen2": _qwen2, "llama with ReFT": _reft}


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKING)
def test_a_model_that_follows_position_ids_packs(name, attention, flat):
    model = PACKING[name]()
    model.set_attn_implementation(attention)
    check_model_packs(model, PAD, flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_is_not_taken_for_a_leak(family, dtype):
    check_model_packs(make(family).to(dtype), PAD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_leak_is_not_taken_for_rounding(dtype):
    with pytest.raises(UserError, match="--packing: got a _Leaking"):
        check_model_packs(_Leaking().to(dtype), PAD)


def _masked_bert():
    config = transformers.BertConfig(**COMMON, intermediate_size=64, max_position_embeddings=64)
    return transformers.BertForMaskedLM(config)


def _headless_bert():
    return make("bert").base_model


class _Leaking(torch.nn.Module):
    """A model that drops the position ids on their way to the mask."""

    def __init__(self):
        super().__init__()
        self.inner = make("llama")

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, position_ids=None, attention_mask=None, **kwargs):
        return self.inner(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            position_ids=position_ids,
            **kwargs,
        )


class _NotANumber(_Leaking):
    def forward(self, input_ids, **kwargs):
        outputs = self.inner(input_ids)
        outputs.logits = outputs.logits * float("nan")
        return outputs


@pytest.mark.parametrize(
    "make_model, name",
    [
        (lambda: make("bert"), "BertForSequenceClassification"),
        (_masked_bert, "BertForMaskedLM"),
        (_headless_bert, "BertModel"),
        (lambda: make("bloom"), "BloomForCausalLM"),
        (lambda: make("t5"), "T5ForConditionalGeneration"),
        (_Leaking, "_Leaking"),
        (_NotANumber, "_NotANumber"),
        (lambda: _reft("bloom"), "BloomForCausalLM"),
    ],
)
def test_a_model_that_does_not_pack_is_refused_by_its_name(make_model, name):
    with pytest.raises(
        UserError, match=f"--packing: got a {name}, which does not keep packed sequences apart"
    ):
        check_model_packs(make_model(), PAD)


@pytest.mark.parametrize("family, refused", [("llama", False), ("bert", True)])
def test_the_check_leaves_modes_and_randomness_alone(family, refused):
    model = make(family).train()
    next(model.children()).eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    try:
        check_model_packs(model, PAD)
    except UserError:
        assert refused
    assert [m.training for m in model.modules()] == modes and torch.equal(
        torch.get_rng_state(), state
    )
    assert all(p.grad is None for p in model.parameters())


# ---- training on packed rows


def _summed_loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_weights": False},
        {"positions": "l1"},
        {"positions": "all"},
        {"pyreft_positions": True},
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_packed_and_padded_batches_have_the_same_loss_and_gradients(family, settings, flat):
    model = _reft(family, **settings).double()
    items = _items()
    loss, gradients = _summed_loss_and_gradients(model, PackingCollator(16, PAD, flat)(items))
    padded_loss, padded = _summed_loss_and_gradients(model, PaddingCollator(PAD)(items))
    # the loss is computed in fp32 whatever the model's dtype, so its rounding is what the two may
    # differ by
    torch.testing.assert_close(loss.float(), padded_loss.float())
    assert gradients.keys() == padded.keys() and any(g.abs().max() > 0 for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient.float(), padded[name].float(), msg=lambda text, name=name: f"{name}: {text}"
        )
