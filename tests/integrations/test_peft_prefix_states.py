"""States kept across training steps: losses and gradients are those of the whole batch."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig, keep_prefix_states, keep_supervised_logits
from tests.families.family import VERSION_5
from tests.integrations.test_peft_checkpointing import checkpointing
from tests.model.families import COMMON, LENGTH, SPECIAL, VOCAB, batch, hook_count, make, shake
from tests.model.families import blocks as blocks_of

MANY = 10**8
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2")
EDITS = {
    "last tokens": {"positions": "l3"},
    "last tokens of upper layers": {"positions": "l3", "layers": [1, 2]},
    "the last layer": {"positions": "l3", "layers": [2]},
    "both ends of upper layers": {"positions": "f2+l2", "layers": [1, 2], "share_weights": False},
    "all tokens of parts": {"positions": "all", "layers": [1, 2], "component": "mlp_output"},
    "last tokens of parts": {"positions": "l2", "layers": [1, 2], "component": "attention_output"},
}


def build(family="llama", base=None, **config):
    torch.manual_seed(0)
    config = config or {"positions": "l3"}
    model = get_peft_model(base or make(family), ReftConfig(rank=4, **config))
    shake(model)
    return model.double().train()


def gemma_of_both_kinds():
    config = transformers.Gemma3TextConfig(
        **COMMON,
        **SPECIAL,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config)


def step(model, inputs):
    """Loss and gradients of one batch."""
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    return output.loss.detach(), found


def assert_same(got, want, tolerance=1e-6):
    assert torch.allclose(got[0], want[0], rtol=tolerance, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, plain in want[1].items():
        assert (got[1][name] - plain).abs().max() <= tolerance * plain.abs().max(), name


def compare(model, *calls, tolerance=1e-6):
    """Compare two steps of each call with steps without; the second finds what the first kept."""
    want = [step(model, inputs) for inputs in calls]
    with keep_prefix_states(model, max_bytes=MANY) as states:
        for _ in range(2):
            for inputs, expected in zip(calls, want, strict=True):
                assert_same(step(model, inputs), expected, tolerance)
    return states.statistics


# ---- losses and gradients


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, side, edits):
    found = compare(build(family, **EDITS[edits]), batch(family, side=side))
    assert (found.calls, found.plain_calls, found.found, found.computed) == (2, 0, 3, 3)
    assert found.hit_rate == 0.5 and found.bytes > 0
    assert found.tokens == 2 * (24 + 15 + 9)
    if edits in ("last tokens", "last tokens of upper layers"):  # prompts of 18, 9 and 4 tokens
        assert found.tokens_run == found.tokens - 2 * (15 + 6 + 1)


def test_in_fp32():
    model = build().float()
    compare(model, batch("llama"), batch("llama", seed=2, side="left"), tolerance=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_sliding_windows_shorter_than_the_prefix(side):
    model, inputs = build(base=gemma_of_both_kinds()), batch("gemma3", side=side)
    windowed, _ = step(model, inputs)
    model.config.sliding_window = 64
    whole, _ = step(model, inputs)
    assert (windowed - whole).abs() > 1e-4  # the window matters
    model.config.sliding_window = 5
    assert compare(model, inputs).tokens_run == 2 * (9 + 9 + 8)


def test_rows_of_one_length_without_a_mask():
    ids = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(20) < 12, -100)
    assert compare(build(), {"input_ids": ids, "labels": labels}).tokens_run == 2 * 2 * 11


def test_given_position_ids():
    inputs = batch("llama", side="left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    compare(build("gpt2"), inputs)


def test_rows_without_a_prefix_beside_others():
    inputs = batch("llama")
    inputs["labels"][1, 2:] = inputs["input_ids"][1, 2:]
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    assert compare(build(), inputs).tokens_run == 2 * (9 + 15 + 8)


def test_a_batch_without_any_prefix():
    inputs = batch("llama")
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(LENGTH) < 3, -100)
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    found = compare(build(), inputs)
    assert (found.calls, found.plain_calls, found.bytes) == (0, 2, 0)


def test_rows_without_labels_or_prompt():
    inputs = batch("llama")
    inputs["labels"][2] = -100  # all of it is prompt
    inputs["labels"][1] = inputs["input_ids"][1]  # nothing of it is
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    compare(build(), inputs)


def test_rows_are_found_in_any_order_and_company():
    model = build()
    first, second = batch("llama"), batch("llama", seed=2)
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    mixed = [{n: v[order] for n, v in both.items()} for order in ([5, 0, 3], [1, 4], [2])]
    want = [step(model, inputs) for inputs in mixed]
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model, both)
        for inputs, expected in zip(mixed, want, strict=True):
            assert_same(step(model, inputs), expected)
    assert (states.statistics.found, states.statistics.computed) == (6, 6)


def test_a_row_that_occurs_twice_is_computed_once(monkeypatch):
    model, inputs = build(), batch("llama")
    twice = {name: value[[0, 0, 1]] for name, value in inputs.items()}
    with keep_prefix_states(model, max_bytes=MANY) as states:
        computed = []
        original = states._compute
        monkeypatch.setattr(
            states,
            "_compute",
            lambda call, rows: computed.append(len(rows)) or original(call, rows),
        )
        step(model, twice)
    assert computed == [2]


def test_steps_of_an_optimizer():
    """What is kept stays right while the adapter changes."""
    plain, kept = build(), build()
    for model in (plain, kept):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        states = keep_prefix_states(model, max_bytes=MANY) if model is kept else None
        for number in range(6):
            step(model, batch("llama", seed=number % 2))
            optimizer.step()
        if states is not None:
            assert states.statistics.hit_rate == pytest.approx(4 / 6)
            states.close()
    assert_same(step(kept, batch("llama")), step(plain, batch("llama")), 1e-5)


def test_with_the_logits_of_supervised_tokens_only():
    model, inputs = build(), batch("llama")
    want, counts = step(model, inputs), []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: counts.append(args[0].shape[:-1].numel())
    )
    for first, second in ((0, 1), (1, 0)):
        opened = [None, None]
        makers = (keep_supervised_logits, lambda m: keep_prefix_states(m, max_bytes=MANY))
        for number in (first, second):
            opened[number] = makers[number](model)
        assert_same(step(model, inputs), want)
        assert opened[1].statistics.calls == 1
        for each in opened:
            each.close()
    assert counts == [int((inputs["labels"] != -100).sum())] * 2


def test_two_adapters_and_a_change_of_the_active_ones():
    model, inputs = build(positions="l3", layers=[1, 2]), batch("llama")
    model.add_adapter("low", ReftConfig(rank=2, layers=[0, 1], positions="l2"))
    shake(model)
    model.double()
    for active in (["default"], ["default", "low"], ["low"]):
        model.base_model.set_adapter(active)
        compare(model, inputs)
    model.base_model.set_adapter(["default"])
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model, inputs)
        model.base_model.set_adapter(["low"])
        got = step(model, inputs)
    assert states.statistics.found == 0
    assert_same(got, step(model, inputs))


def test_a_response_template():
    model = build(positions="l3", response_template=[5, 6])
    inputs = batch("llama")
    inputs["input_ids"][inputs["input_ids"] == 5] = 7
    for row, prompt in enumerate([18, 9, 4]):
        inputs["input_ids"][row, prompt - 2 : prompt] = torch.tensor([5, 6])
    inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["input_ids"])
    compare(model, inputs)


def test_upper_layers_under_gradient_checkpointing():
    model, inputs = build(positions="l3", layers=[1, 2]), batch("llama")
    want = step(model, inputs)
    checkpointing(model, reentrant=False)
    if not VERSION_5:
        with pytest.raises(ValueError, match="gradient checkpointing of transformers 4 recomputes"):
            keep_prefix_states(model, max_bytes=MANY)
        return
    counts = [0, 0, 0]
    for number, block in enumerate(blocks_of("llama", model.base_model.model)):

        def count(module, args, number=number):
            counts[number] += 1

        block.mlp.register_forward_pre_hook(count)
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model, inputs)
        counts[:] = [0, 0, 0]
        assert_same(step(model, inputs), want)
    assert counts == [0, 0, 2]  # the output of block 1 is edited, so its input is not needed
    assert states.statistics.tokens_run == states.statistics.tokens


def test_blocks_that_return_tuples():
    """As in transformers 4, where blocks of GPT-2 return a tuple of the hidden state."""
    model = build(positions="l3", layers=[2], component="mlp_output")
    base, want = model.base_model.model.model, step(model, batch("llama"))
    original = type(base.layers[0])

    class Block(original):
        def forward(self, *args, **kwargs):
            return (original.forward(self, *args, **kwargs),)

    for block in base.layers:
        block.__class__ = Block
    for module in (*base.layers[1:], base.norm):  # what enters them is such a tuple
        module.register_forward_pre_hook(lambda m, args: args[0])
    assert_same(step(model, batch("llama")), want)
    compare(model, batch("llama"))


# ---- the store


def test_the_limit_holds_and_the_rest_is_computed():
    model = build()
    calls = [batch("llama", seed=seed) for seed in range(3)]
    want = [step(model, inputs) for inputs in calls]
    with keep_prefix_states(model, max_bytes=MANY) as states:
        for inputs in calls:
            step(model, inputs)
    limit = states.statistics.bytes // 2
    with keep_prefix_states(model, max_bytes=limit) as states:
        for _ in range(2):
            for inputs, expected in zip(calls, want, strict=True):
                assert_same(step(model, inputs), expected)
    assert 0 < states.statistics.bytes <= limit
    assert 0 < states.statistics.found < 9


def test_what_is_kept_is_no_larger_than_keys_and_values():
    inputs, model = batch("llama"), build().float()
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model, inputs)
        numbers = (15 + 6 + 1) * 3 * 2 * 2 * 8  # tokens, layers, keys and values, heads, size
        assert 0 <= states.statistics.bytes - 4 * numbers <= 8 * (15 + 6 + 1) + 3 * 4


def test_new_weights_of_the_frozen_model_need_clear():
    model, inputs = build(), batch("llama")
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model, inputs)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        states.clear()
        assert states.statistics.bytes == 0
        got = step(model, inputs)
    assert_same(got, step(model, inputs))


def test_the_statistics_are_one_line(caplog):
    model = build()
    with caplog.at_level("INFO"), keep_prefix_states(model, max_bytes=2**20) as states:
        step(model, batch("llama"))
        step(model, batch("llama"))
        line = str(states.statistics)
    assert line.startswith("prefix states: 3 of 6 rows found (50%), 52 of 96 tokens run")
    assert line.endswith("of 1.0 MiB") and caplog.messages == [line]


# ---- calls that run as they are


def packed():
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(11), torch.arange(13)]).expand(2, -1)
    labels = ids.where(places > 6, -100)
    return {"input_ids": ids, "position_ids": places, "labels": labels, "use_cache": False}


def embedded():
    inputs = batch("llama")
    embeddings = make("llama").get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"] = embeddings.detach().double()
    return inputs


def with_hole():
    inputs = batch("llama")
    inputs["attention_mask"][0, 3] = 0
    return inputs


def with_labels_of_padding():
    inputs = batch("llama")
    inputs["labels"][1, 15] = 5
    return inputs


@pytest.mark.parametrize(
    "inputs",
    [
        packed,
        embedded,
        with_hole,
        with_labels_of_padding,
        lambda: batch("llama") | {"edit_positions": torch.tensor([[3], [4], [-1]])},
        lambda: batch("llama") | {"output_hidden_states": True},
        lambda: batch("llama") | {"logits_to_keep": LENGTH},
    ],
)
def test_other_calls_run_as_they_are(inputs):
    model, inputs = build(), inputs()
    want = step(model, inputs)
    with keep_prefix_states(model, max_bytes=MANY) as states:
        got = step(model, inputs)
        assert model(**inputs).logits is not None
    assert torch.equal(got[0], want[0])
    assert (states.statistics.calls, states.statistics.plain_calls) == (0, 2)


def test_evaluation_and_generation_are_as_ever():
    model, inputs = build(), batch("llama", side="left")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def results():
        with torch.no_grad():
            return [
                model.train()(**inputs).logits,
                model.eval()(**inputs).logits,
                model.generate(**prompt, max_new_tokens=3, do_sample=False),
            ]

    want = results()
    with keep_prefix_states(model, max_bytes=MANY) as states:
        step(model.train(), inputs)
        got = results()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert states.statistics.calls == 1


def test_close_restores_the_model():
    model, inputs = build(), batch("llama")
    base, hooks = model.base_model.model, hook_count(model)
    with keep_prefix_states(model, max_bytes=MANY) as states:
        assert "forward" in base.model.layers[0].__dict__
    states.close()
    assert hook_count(model) == hooks
    assert all("forward" not in block.__dict__ for block in base.model.layers)
    assert step(model, inputs) and model(**inputs).logits is not None
    keep_prefix_states(model, max_bytes=MANY).close()


def test_an_error_in_a_forward_leaves_no_state():
    model, inputs = build(positions="l3", layers=[1, 2]), batch("llama")
    want = step(model, inputs)
    with keep_prefix_states(model, max_bytes=MANY):
        handle = model.get_output_embeddings().register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, inputs)
        handle.remove()
        with torch.no_grad():
            assert model(**inputs).logits is not None
        assert_same(step(model, inputs), want)
