"""Each family: identity at initialization, edited rows, gradients, saving, disabling."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.families.family import VERSION_5
from tests.model.families import (
    DECODERS,
    FAMILIES,
    batch,
    blocks,
    hook_count,
    make,
    plain_hooks,
    prompt_columns,
    shake,
    stacks,
    within,
)

EVERY = pytest.mark.parametrize("family", list(FAMILIES))


def adapted(family: str, **kwargs):
    return get_peft_model(make(family), ReftConfig(rank=4, **kwargs))


def straightforward(family: str, stack, inputs, dtype, *, learn=False):
    """Logits and loss of the base model with plain hooks.

    With ``learn``, also the gradients of R (by layer), W and b.
    """
    plain = make(family).to(dtype).requires_grad_(False)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    R, W, b = (t.detach().to(dtype).requires_grad_(learn) for t in (stack.R, stack.W, stack.b))

    def columns(hidden):
        return prompt_columns(family, inputs, 7, 7, hidden.shape[1])

    with (
        torch.set_grad_enabled(learn),
        plain_hooks(family, plain, columns, lambda n: (R[n], W[n], b[n])),
    ):
        output = plain(**cast)
    if learn:
        output.loss.backward()
    return output.logits.detach(), output.loss.detach(), (R.grad, W.grad, b.grad)


@EVERY
def test_identity_leaves_the_logits_bit_identical(family):
    inputs, plain = batch(family), make(family)
    with torch.no_grad():
        expected = plain(**inputs).logits
        model = adapted(family)
        edited = model(**inputs).logits
    assert torch.equal(edited, expected)


# only generating models pad on the left; Bloom in fp64 gives NaN with left padding
@pytest.mark.parametrize(
    ("family", "side"),
    [(f, "right") for f in FAMILIES] + [(f, "left") for f in ("llama", "gpt2", "neox")],
)
def test_logits_equal_those_of_straightforward_hooks(family, side):
    inputs, model = batch(family, side=side), adapted(family)
    shake(model)
    (stack,) = stacks(model)
    plain, _, _ = straightforward(family, stack, inputs, torch.float32)
    exact, _, _ = straightforward(family, stack, inputs, torch.float64)
    with torch.no_grad():
        got = model(**inputs).logits
        frozen = make(family)(**inputs).logits
    if family in DECODERS:  # logits at padding tokens are undefined
        real = inputs["attention_mask"].bool()
        got, plain, exact, frozen = (t[real] for t in (got, plain, exact, frozen))
    assert within(got, plain, exact)
    assert (got - frozen).abs().max() > 100 * (plain - exact).abs().max()


@EVERY
def test_edits_exactly_the_chosen_rows(family):
    """In the output of the first block, exactly the chosen rows differ from the base model's."""
    inputs, model, plain = batch(family), adapted(family), make(family)
    shake(model)
    seen = []

    def capture(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    blocks(family, plain)[0].register_forward_hook(capture)
    blocks(family, model.base_model.model)[0].register_forward_hook(capture)
    with torch.no_grad():
        plain(**inputs), model(**inputs)
    before, after = seen
    changed = (before != after).any(dim=-1)
    expected = torch.zeros_like(changed)
    for row, columns in enumerate(prompt_columns(family, inputs, 7, 7, before.shape[1])):
        expected[row, columns] = True
    assert torch.equal(changed, expected)


@EVERY
def test_gradients_reach_every_parameter_and_equal_the_straightforward_ones(family):
    inputs, model = batch(family), adapted(family)
    shake(model)
    (stack,) = stacks(model)
    model.train()
    model(**inputs).loss.backward()
    for name, parameter in stack.named_parameters():
        by_layer = parameter.grad.flatten(1).abs().amax(dim=1)
        assert (by_layer > 0).all(), name
    assert all(p.grad is None for n, p in model.named_parameters() if "reft_" not in n)
    _, _, (_, plain_W, plain_b) = straightforward(family, stack, inputs, torch.float32, learn=True)
    _, _, (exact_R, exact_W, exact_b) = straightforward(
        family, stack, inputs, torch.float64, learn=True
    )
    assert within(stack.W.grad, plain_W, exact_W)
    if family == "vit" and not VERSION_5 and not within(stack.b.grad, plain_b, exact_b):
        # with AVX-512 the plain gradient has a third of the error that it has in transformers 5
        pytest.xfail("three times the error of an exceptionally exact plain computation")
    assert within(stack.b.grad, plain_b, exact_b)
    # X's gradient from R's, by the same map in fp64
    X = stack.X.detach().double().requires_grad_()
    R = torch.stack([_householder(x) for x in X]) * stack.signs.double().unsqueeze(-1)
    R.backward(exact_R)
    _, _, (plain_R, _, _) = straightforward(family, stack, inputs, torch.float32, learn=True)
    X32 = stack.X.detach().clone().requires_grad_()
    (torch.stack([_householder(x) for x in X32]) * stack.signs.unsqueeze(-1)).backward(plain_R)
    assert within(stack.X.grad, X32.grad, X.grad)


def _householder(X: torch.Tensor) -> torch.Tensor:
    V = X.tril(-1) + torch.eye(*X.shape, dtype=X.dtype)
    return torch.linalg.householder_product(V, 2.0 / (V * V).sum(dim=0)).mT


@EVERY
def test_saved_and_loaded_into_a_fresh_model_the_logits_are_bit_identical(family, tmp_path):
    inputs, model = (
        batch(family),
        adapted(family, layers=[0, 2], positions="f3+l2", share_weights=False),
    )
    shake(model)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }
    again = PeftModel.from_pretrained(make(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.peft_config["default"].layers == [0, 2]
    assert not again.training and not any(p.requires_grad for p in again.parameters())


@EVERY
def test_off_is_the_frozen_model_bit_for_bit_and_unloading_leaves_no_trace(family):
    inputs, model, plain = batch(family), adapted(family), make(family)
    shake(model)
    with torch.no_grad():
        expected = plain(**inputs).logits
        with model.disable_adapter():
            assert torch.equal(model(**inputs).logits, expected)
        assert not torch.equal(model(**inputs).logits, expected)
        bare = model.unload()
        assert torch.equal(bare(**inputs).logits, expected)
    assert hook_count(bare) == hook_count(plain)
    assert set(bare.state_dict()) == set(plain.state_dict())
    assert "generate" not in bare.__dict__ and not hasattr(bare, "peft_config")


@EVERY
def test_hooks_are_registered_once(family):
    inputs, plain, model = batch(family), make(family), adapted(family)
    count = hook_count(model)
    # 2 on the model, 2 on its backbone, 1 on each block
    assert count == hook_count(plain) + 4 + len(blocks(family, plain))
    for _ in range(3):
        model(**inputs).loss.backward()
    assert hook_count(model) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "bloom", "bert"])
def test_half_precision_models_keep_fp32_parameters(family, dtype):
    inputs = batch(family)
    model = get_peft_model(make(family).to(dtype), ReftConfig(rank=4))
    (stack,) = stacks(model)
    assert all(p.dtype == torch.float32 for p in stack.parameters())
    shake(model)
    output = model(**inputs)
    assert output.logits.dtype == dtype
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in stack.parameters())
