"""Models and micro-batches for tests of gradient accumulation, and the expected gradients."""

from __future__ import annotations

import warnings

import torch
from peft import get_peft_model

from reft_kernels.integrations.peft import ReftConfig
from tests.model.families import batch, make, shake

MICRO = 4
OTHER = {
    "intervention": "nodireft",
    "init": "orthogonal",
    "component": "mlp_activation",
    "layers": [0, 2],
}


def build(family: str = "llama", **kwargs):
    """A model in fp64, so that the order of summation does not matter."""
    model = get_peft_model(make(family), ReftConfig(rank=4, **kwargs))
    shake(model)
    return model.double().train()


def two_adapters():
    model = get_peft_model(make("llama"), ReftConfig(rank=4))
    model.add_adapter("other", ReftConfig(rank=2, **OTHER))
    model.base_model.set_adapter(["default", "other"])
    shake(model)
    return model.double().train()


def micro_batches(family: str = "llama", count: int = MICRO) -> list[dict[str, torch.Tensor]]:
    batches = [batch(family, seed=seed) for seed in range(count)]
    return [
        {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        for inputs in batches
    ]


def accumulate(model, inputs) -> None:
    for one in inputs:
        (model(**one).loss / len(inputs)).backward()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def expected(make_model, inputs) -> dict[str, torch.Tensor]:
    model = make_model()
    accumulate(model, inputs)
    return gradients(model)


def compare(model, want: dict[str, torch.Tensor]) -> None:
    got = gradients(model)
    assert got.keys() == want.keys() and any(g.abs().max() > 0 for g in got.values())
    torch.testing.assert_close(got, want)


def checkpointing(model, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    model.enable_input_require_grads()
