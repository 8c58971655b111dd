"""The model and what is trained on it, without their weights: built from the configuration on
PyTorch's meta device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from reft_train import methods, models
from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.tasks.base import Task


@dataclass(frozen=True)
class Widths:
    """Numbers that a layer keeps for each token, and those of them that RMSNorm keeps in fp32;
    its linears' weights.
    """

    kept: int
    normed: int
    linear: int


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        adapted: the model with the method's parameters. kind: how it is used, as in
            :class:`reft_train.models.Loaded`.
        base_numbers, base_bytes: of its parameters, and of these and buffers, before anything was
            added.
        widths: of each layer, in a list for each of the model's stacks (encoder, decoder), before
            the method changed them.
        hidden, vocabulary, heads, longest: of the configuration; ``longest`` None where it has no
            limit of tokens.
        eager: attention is computed as written, scores kept.
    """

    adapted: nn.Module
    kind: str
    base_numbers: int
    base_bytes: int
    widths: list[list[Widths]]
    hidden: int
    vocabulary: int
    heads: int
    eager: bool
    longest: int | None


def _linear(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer; GPT-2's Conv1D is one with its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return tuple(module.weight.shape)
    return None


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, int]]]:
    """The linear layers with their names and (inputs, outputs)."""
    for name, module in model.named_modules():
        shape = _linear(module)
        if shape is not None:
            yield name, module, shape


def _widths(block: nn.Module) -> Widths:
    kept = linear = 0
    for parent in block.modules():
        shapes = [shape for shape in map(_linear, parent.children()) if shape is not None]
        kept += sum(outputs for _, outputs in shapes)
        linear += sum(inputs * outputs for inputs, outputs in shapes)
        if len(shapes) > 1:
            kept += shapes[-1][0]
    normed = sum(m.weight.numel() for m in block.modules() if "RMSNorm" in type(m).__name__)
    return Widths(kept, normed, linear)


def _block_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and any(True for _ in linears(child)):
            yield child
        else:
            yield from _block_lists(child)


def _first(hf_config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(hf_config, name, None)
        if isinstance(value, int):
            return value
    return None


def _empty(config: RunConfig, hf_config: Any, kind: str, task: Task) -> nn.Module:
    import torch
    import transformers

    from reft_train.pooling import MeanPooledClassifier

    if kind == models.CLASSIFICATION:
        hf_config.num_labels = task.num_labels
    options = {} if config.attention is None else {"attn_implementation": config.attention}
    try:
        with torch.device("meta"):
            model = getattr(transformers, models.class_of(config, kind))
            model = model.from_config(hf_config, dtype=models.weight_dtype(config), **options)
            return (
                MeanPooledClassifier(model, hf_config.num_labels, config.seed)
                if config.pooling == "mean"
                else model
            )
    except (ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model: got {config.model!r}, which cannot be built ({reason[:300]})"
        ) from None


def build(config: RunConfig, task: Task) -> Skeleton:
    """The model of the settings and the method's parameters on it, from ``config.json`` alone.

    A classification head is taken to be new; where a checkpoint lacks other modules too, they are
    trained besides.

    Raises:
        UserError: no such model, one that does not serve the task, or layers or components that it
            does not have.
    """
    hf_config = models.model_config(config)
    kind = models.kind_of(config, hf_config, task)
    model = _empty(config, hf_config, kind, task).requires_grad_(False)
    base = [*model.parameters(), *model.buffers()]
    text = hf_config.get_text_config() if hasattr(hf_config, "get_text_config") else hf_config
    widths = [[_widths(block) for block in blocks] for blocks in _block_lists(model)]
    heads = (
        [name for name in models.HEADS if hasattr(model, name)]
        if kind == models.CLASSIFICATION
        else []
    )
    numbers, size = (
        sum(p.numel() for p in model.parameters()),
        sum(t.numel() * t.element_size() for t in base),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisations that do nothing without memory
        adapted = methods.adapt(config, models.Loaded(model, None, kind, heads))
    return Skeleton(
        adapted=adapted,
        kind=kind,
        base_numbers=numbers,
        base_bytes=size,
        widths=widths,
        hidden=_first(text, "hidden_size", "d_model", "n_embd", "dim") or 0,
        vocabulary=_first(text, "vocab_size") or 0,
        heads=_first(text, "num_attention_heads", "num_heads", "n_head", "n_heads") or 0,
        eager=getattr(model.config, "_attn_implementation", "eager") == "eager",
        longest=_first(text, "max_position_embeddings", "n_positions"),
    )
