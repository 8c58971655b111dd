"""The shapes of hidden states at a component's targets, recorded in a plain run of the model."""

from __future__ import annotations

import contextlib
import inspect

import torch
from torch import nn

from reft_kernels.model import Component


def _hidden(values) -> torch.Tensor | None:
    if isinstance(values, torch.Tensor):
        return values
    return (
        values[0]
        if isinstance(values, tuple | list) and values and isinstance(values[0], torch.Tensor)
        else None
    )


def record(
    model: nn.Module, component: Component, inputs: dict[str, torch.Tensor]
) -> tuple[list[list], list[tuple | None]]:
    """Record shapes in a plain run of the model.

    Returns:
        For each target, the shapes of its hidden state, one per call; for each call of the
        backbone, the shape of its tokens, or None.
    """
    shapes: list[list] = [[] for _ in component.targets]
    calls: list[tuple | None] = []
    backbone = model.get_submodule(component.backbone)
    names = list(inspect.signature(backbone.forward).parameters)

    def called(module, args, kwargs):
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = ("input_ids", "inputs_embeds")
        if component.decoder:
            inputs = ("decoder_input_ids", *inputs)
        tokens = [arguments[n] for n in inputs if isinstance(arguments.get(n), torch.Tensor)]
        calls.append(tuple(tokens[0].shape[:2]) if tokens else None)

    def output(seen):
        return lambda module, args, result: seen.append(tuple(_hidden(result).shape))

    def entry(seen):
        def hook(module, args, kwargs):
            values = (*args, kwargs.get("hidden_states"), *kwargs.values())
            seen.append(next(tuple(v.shape) for v in values if isinstance(v, torch.Tensor)))

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        handles = [backbone.register_forward_pre_hook(called, with_kwargs=True)]
        for target, seen in zip(component.targets, shapes, strict=True):
            module = model.get_submodule(target.path)
            if target.side == "output":
                handles.append(module.register_forward_hook(output(seen)))
            else:
                handles.append(module.register_forward_pre_hook(entry(seen), with_kwargs=True))
        for handle in handles:
            stack.callback(handle.remove)
        model(**inputs)
    return shapes, calls


def fits(shape: tuple[int, ...], layout: str, tokens: tuple[int, int]) -> bool:
    """Whether a hidden state of a layout may have this shape for tokens ``[B, T]``."""
    batch_size, length = tokens
    before = shape[:-1]
    return {
        "btd": before in (tokens, (batch_size * length,)),
        "tbd": before == (length, batch_size),
        "btsd": len(before) == 3 and before[:2] == tokens,
        "sbtd": len(before) == 3 and before[1:] == tokens,
        "btd_padded": len(before) == 2 and before[0] == batch_size and before[1] >= length,
    }[layout]
