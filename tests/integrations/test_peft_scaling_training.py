"""Training with the arguments ``subspaces`` and ``strengths``: gradients, checkpointing, trainers."""

from __future__ import annotations

import warnings

import pytest
import torch

from reft_kernels.parametrization import build as build_rows
from tests.integrations.scaling import STRENGTHS, SUBSPACES, build, logits, table
from tests.integrations.test_peft_trainer import Texts, losses, trainer
from tests.model.families import batch, blocks, make, prompt_columns, stacks, within


def gradients(model, inputs, **call):
    model.zero_grad()
    model(**inputs, **call).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["loreft", "noreft"])
def test_gradients_reach_the_chosen_rows_only(name):
    model, inputs = build(intervention=name).train(), batch("llama")
    whole = gradients(model, inputs)
    chosen = gradients(model, inputs, subspaces=[[1, 3]] * 3)
    others = gradients(model, inputs, subspaces=[0, 2])
    zero = gradients(model, inputs, strengths=0)
    for key, gradient in chosen.items():
        assert zero[key].abs().max() == 0 < whole[key].abs().max()
        if key.endswith(".X"):  # R couples its rows
            continue
        rows = gradient.flatten(2) if gradient.dim() > 2 else gradient.unsqueeze(-1)
        assert not rows[:, [0, 2]].any() and rows[:, [1, 3]].any(dim=-1).all()
        rest = others[key].flatten(2) if gradient.dim() > 2 else others[key].unsqueeze(-1)
        assert not rest[:, [1, 3]].any() and rest[:, [0, 2]].any(dim=-1).all()


def test_training_is_that_of_plain_autograd():
    model, inputs = build(positions="f3+l2").train(), batch("llama")
    call = {"subspaces": SUBSPACES, "strengths": STRENGTHS}
    got = gradients(model, inputs, **call)
    columns = prompt_columns("llama", inputs, 3, 2, 24)
    results = []
    for dtype in (torch.float32, torch.float64):
        stack = stacks(model)[0]
        leaves = {n: p.detach().to(dtype).requires_grad_() for n, p in stack.named_parameters()}
        R = build_rows("householder", leaves["X"], signs=stack.signs.to(dtype))[0]
        plain = make("llama").to(dtype)
        coeff = table(SUBSPACES, STRENGTHS).to(dtype)
        for layer, block in enumerate(blocks("llama", plain)):

            def hook(module, args, output, layer=layer, leaves=leaves, R=R, coeff=coeff):
                hidden = output[0] if isinstance(output, tuple) else output
                edited = hidden.clone()
                for row, chosen in enumerate(columns):
                    h = hidden[row, chosen]
                    update = h @ leaves["W"][layer].T + leaves["b"][layer] - h @ R[layer].T
                    edited[row, chosen] = h + (coeff[row] * update) @ R[layer]
                return (edited, *output[1:]) if isinstance(output, tuple) else edited

            block.register_forward_hook(hook)
        plain(**inputs).loss.backward()
        results.append({n: p.grad for n, p in leaves.items()})
    for key, gradient in got.items():
        name = key.rsplit(".", 1)[1]
        assert within(gradient, results[0][name], results[1][name])


@pytest.mark.parametrize("kind", ["loreft", "red"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(kind, reentrant):
    inputs = batch("llama")
    call = {"strengths": STRENGTHS} | ({} if kind == "red" else {"subspaces": SUBSPACES})
    plain, checkpointed = (build(intervention=kind).train() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        checkpointed.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    checkpointed.enable_input_require_grads()
    want, got = (gradients(model, inputs, **call) for model in (plain, checkpointed))
    assert want.keys() == got.keys()
    for key, gradient in want.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-7)


def test_dropout_is_multiplied():
    model, inputs = build(dropout=0.5).train(), batch("llama")
    torch.manual_seed(0)
    want = logits(model, inputs)
    torch.manual_seed(0)
    assert torch.equal(logits(model, inputs, strengths=[1, 1, 1]), want)
    with model.disable_adapter():
        frozen = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs, strengths=[0, 0, 0]), frozen)


def test_strengths_can_be_learned():
    model, inputs = build(), batch("llama")
    strengths = torch.tensor(STRENGTHS, requires_grad=True)
    model(**inputs, strengths=strengths).loss.backward()
    step = 1e-2
    losses = [
        model(**inputs, strengths=torch.tensor(STRENGTHS) + sign * step * torch.eye(3)[0]).loss
        for sign in (1, -1)
    ]
    torch.testing.assert_close(
        strengths.grad[0], (losses[0] - losses[1]) / (2 * step), rtol=0.02, atol=1e-4
    )


def test_subspaces_as_a_column_of_a_trainers_data(tmp_path):
    model = build(task_type="CAUSAL_LM", intervention="noreft", init="identity")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    run = trainer(
        tmp_path,
        model=model,
        dataset=Texts(subspaces=torch.tensor([1, 3])),
        remove_unused_columns=False,
        steps=2,
        weight_decay=0.0,
    )
    run.train()
    assert len(losses(run)) == 2
    for key, parameter in model.named_parameters():
        if key in before:
            moved = (parameter.detach() != before[key]).flatten(2 if parameter.dim() > 2 else 1)
            moved = moved.any(dim=-1) if parameter.dim() > 2 else moved
            assert not moved[:, [0, 2]].any() and moved[:, [1, 3]].all()
