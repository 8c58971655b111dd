"""Which models have states that training with ReFT adapters does not change."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from reft_kernels.integrations.peft.layer import AdapterContainer
from reft_kernels.model import Editor
from reft_kernels.model.backbone_session import BackboneSession, trained_besides_edits

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache")
_LAYER_TYPES = ("full_attention", "sliding_attention")


def only_editor(model: nn.Module) -> Editor:
    """The editor of a model.

    Raises:
        ValueError: the model has no ReFT adapters, or contains several models that have.
    """
    editors = [m.editor for m in model.modules() if isinstance(m, AdapterContainer)]
    if len(editors) != 1:
        raise ValueError(f"model: got {len(editors)} models with ReFT adapters, expected one")
    return editors[0]


def only_session(editor: Editor, model: nn.Module) -> BackboneSession:
    """The session of the backbone of a causal language model.

    Raises:
        ValueError: the adapters edit another model, or several backbones.
    """
    if editor.model is not model or len(editor.sessions) != 1:
        raise ValueError(
            f"model: ReFT edits {type(editor.model).__name__} in {len(editor.sessions)} backbones, "
            f"expected {type(model).__name__} in one"
        )
    return editor.sessions[0]


def refuse_unfit(model: Any, backbone: nn.Module) -> None:
    """Raise if a training forward of a model without edits may change its states.

    Args:
        model: a causal language model.
        backbone: the part of it that runs the blocks.

    Raises:
        ValueError: the backbone lacks an argument, has layers without key-value caches, a loss of
            its own, several devices, dropout, or parameters that are trained.
    """
    parameters = inspect.signature(backbone.forward).parameters
    missing = [name for name in _ARGUMENTS if name not in parameters]
    if missing:
        raise ValueError(
            f"model: the forward of {type(backbone).__name__} has no argument {missing[0]}, which "
            "prefix states need"
        )
    kinds = set(getattr(model.config, "layer_types", None) or ()) - set(_LAYER_TYPES)
    if kinds:
        raise ValueError(
            f"model: layers of type {min(kinds)!r}; prefix states need full or sliding attention"
        )
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            "model: output_router_logits adds a loss over all tokens, which prefix states leave out"
        )
    devices = {p.device for p in backbone.parameters()}
    if len(devices) != 1:
        raise ValueError(f"model: spread over {len(devices)} devices; prefix states need one")
    trained = trained_besides_edits(backbone)
    if trained is not None:
        raise ValueError(
            f"model: {trained} is trained, so the states before the first edit change; expected "
            "a frozen model with ReFT adapters"
        )
    random = next(_random_parts(backbone), None)
    if random is not None:
        raise ValueError(
            f"model: {random}, so the states before the first edit change in each step; expected a "
            "model without dropout, such as from_pretrained(..., attention_dropout=0.0)"
        )


def _random_parts(backbone: nn.Module) -> Iterator[str]:
    """Names and values of the probabilities with which a model drops something in training."""
    for path, module in backbone.named_modules():
        values = {"p": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else {}
        values |= {k: v for k, v in vars(module).items() if "drop" in k or "jitter" in k}
        for name, value in values.items():
            if isinstance(value, float) and value > 0:
                yield f"{path or type(module).__name__}.{name} is {value}"
