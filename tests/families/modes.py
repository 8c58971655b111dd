"""Checks of gradient checkpointing and ``torch.compile``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.families import checks
from tests.families.family import BATCH, Batch, Family, places

SAME_ROWS, SAME_GRADIENTS, COMPILED_ROWS, COMPILED_GRADIENTS = 1e-6, 2e-5, 1e-5, 5e-5
_COMPILED = """
llama gemma2 gpt2 mixtral deepseek_v3 mamba xlnet bert modernbert t5 t5_decoder bart vit swin
wav2vec2 whisper llava
"""
COMPILED = _COMPILED.split()
"""The families whose compiled model is compared with its uncompiled one."""

ENDLESS = ("wavlm",)
"""Families whose base model hangs with reentrant checkpointing: layers pass a bias to the next."""


def training_batch(family: Family) -> Batch:
    """A batch for training, with labels if the family has them."""
    for _, batch, *_ in checks.labelled(family):
        if "labels" in batch:
            return batch
    return family.inputs("right", BATCH) or family.inputs("none", BATCH)


def trained(family: Family, seed: int) -> nn.Module:
    """A model with an adapter in training mode; the same in each call."""
    base = checks.base_of(family)
    torch.manual_seed(0)
    return checks.shake(checks.attach(base, family.component).train(), seed)


def step(family: Family, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
    """Logits and gradients of the adapter's parameters."""
    model.zero_grad(set_to_none=True)
    with checks.calm():
        output = checks.call(model, batch)
        checks.loss_of(family, batch, output).backward()
    logits = checks.meaningful(family, batch, checks.leading(output))
    grads = [p.grad for stack in checks.stacks(model) for p in stack.parameters()]
    return logits.detach(), [None if g is None else g.clone() for g in grads]


def compare(
    got: tuple[Tensor, list], want: tuple[Tensor, list], rows: float, gradients: float, name: str
) -> None:
    """Compare the logits and gradients of two runs."""
    checks.close(got[0], want[0], rows, f"{name}, logits")
    assert any(g is not None for g in want[1]), "the reference has no gradients"
    for index, (one, other) in enumerate(zip(got[1], want[1], strict=True)):
        assert (one is None) == (other is None), f"{name}, parameter {index}: a gradient is missing"
        if other is not None:
            checks.close(one, other, gradients, f"{name}, gradient {index}")


def checkpointed(model: nn.Module, reentrant: bool) -> bool:
    """Enable checkpointing; returns False if the model does not support it."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    with checks.calm():
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
        if reentrant:  # requires that the input of the first layer has a graph
            with contextlib.suppress(NotImplementedError):
                model.enable_input_require_grads()
    return True


def base_failure(family: Family, reentrant: bool, batch: Batch) -> str:
    """The reason why checkpointing fails for the base model with trained blocks; "" if it works."""
    base = checks.base_of(family).train()
    for path, _ in places(base, family.role(), family.count):
        base.get_submodule(path).requires_grad_(True)
    losses, gradients = [], []
    try:
        for turn in range(2):
            if turn:
                checkpointed(base, reentrant)
            base.zero_grad(set_to_none=True)
            loss = checks.loss_of(family, batch, checks.call(base, batch))
            loss.backward()
            losses.append(loss.detach())
            grads = [p.grad for p in base.parameters()]
            gradients.append([None if g is None else g.clone() for g in grads])
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:160]}"
    for one, other in zip(*gradients, strict=True):
        if (one is None) != (other is None):
            return "a parameter loses its gradient"
        if one is not None and checks.distance(other, one) > SAME_GRADIENTS:
            return "other gradients"
    return "" if checks.distance(losses[1], losses[0]) <= SAME_ROWS else "another loss"


def check_checkpointing(family: Family, seed: int = 7) -> None:
    """Gradient checkpointing, reentrant and not, gives the same logits and gradients.

    Raises:
        BaseFails: the base model works with neither.
    """
    batch = training_batch(family)
    model = trained(family, seed)
    want = step(family, model, batch)
    reasons: list[str] = []
    for reentrant in (False,) if family.name in ENDLESS else (False, True):
        model = trained(family, seed)
        if not checkpointed(model, reentrant):
            return
        name = f"use_reentrant={reentrant}"
        try:
            compare(step(family, model, batch), want, SAME_ROWS, SAME_GRADIENTS, name)
        except Exception:
            reason = base_failure(family, reentrant, batch)
            if not reason:
                raise
            reasons.append(f"{name}: {reason}")
    if len(reasons) == 2 or (reasons and family.name in ENDLESS):
        raise checks.BaseFails(f"gradient checkpointing, {'; '.join(reasons)}")


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def check_compile(family: Family, seed: int = 7) -> None:
    """A compiled model gives the same logits and gradients, for two batch shapes."""
    batch = training_batch(family)
    with fresh_compiler():
        model, plain = trained(family, seed), trained(family, seed)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
        smaller = {name: value[:2] for name, value in batch.items()}
        for inputs in (batch, smaller):
            want = step(family, plain, inputs)
            got = step(family, compiled, inputs)
            compare(got, want, COMPILED_ROWS, COMPILED_GRADIENTS, "compiled")
