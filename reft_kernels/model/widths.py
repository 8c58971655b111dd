"""The width of a module's input or output: from its own weights, or from the configuration of the tower that holds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from reft_kernels.model.families import own_config

_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim")


def read_integer(config: Any, names: Iterable[str]) -> int | None:
    """The first positive integer among a configuration's attributes."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def own_width(module: nn.Module, side: str) -> int | None:
    """Width of a module's input or output, from its own weight; None where the weight does not tell."""
    features = getattr(module, "in_features" if side == "input" else "out_features", None)
    if isinstance(features, int):
        return features
    weight = getattr(module, "weight", None)
    if weight is None or not hasattr(weight, "dim"):
        return None
    if isinstance(getattr(module, "nf", None), int) and weight.dim() == 2:  # transformers' Conv1D: [in, out]
        return weight.shape[0 if side == "input" else 1]
    return weight.shape[0] if weight.dim() == 1 else None


def _sizes(module: nn.Module) -> set[int]:
    found = (own_width(m, side) for m in module.modules() for side in ("input", "output"))
    return {width for width in found if width is not None}


def is_stage(block: nn.Module) -> bool:
    """Whether a block is a stage of a hierarchical transformer: blocks of one width, then a merging of patches."""
    return hasattr(block, "downsample")


def _stage_width(stage: nn.Module, side: str) -> int | None:
    """Width before a stage, that of its blocks, or after it, that of its patch merging."""
    merging = stage.downsample
    if side == "output" and merging is not None:
        return next(m.out_features for m in reversed(list(merging.modules())) if isinstance(m, nn.Linear))
    return next((w for m in stage.modules() if "Norm" in type(m).__name__ and (w := own_width(m, "input"))), None)


def part_width(module: nn.Module, side: str, stream: int | None) -> int | None:
    """Width of the input or output of an attention, a mixer or a dense feed-forward.

    The residual stream's, where a projection in it has that width; else its first projection's input or its last one's output.
    """
    found = [w for m in module.modules() if _is_projection(m) and (w := own_width(m, side)) is not None]
    if not found or stream in found:
        return stream
    return found[0 if side == "input" else -1]


def _is_projection(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return hasattr(weight, "dim") and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def stream_width(model: nn.Module, path: str, block: nn.Module, side: str = "output") -> int | None:
    """Width of the residual stream before ("input") or after ("output") a block.

    The nearest configuration around it that names a width which a weight of the block has, so that a tower's own comes before
    the text model's; else the width of the block's first norm or linear layer.
    """
    if is_stage(block):
        return _stage_width(block, side)
    sizes = _sizes(block)
    for config in own_config(model, path):
        getter = getattr(config, "get_text_config", None)
        for candidate in (config, getter() if callable(getter) else None):
            width = read_integer(candidate, _NAMES)
            if width is not None and (not sizes or width in sizes):
                return width
    return next((w for w in (own_width(m, "input") for m in block.modules()) if w is not None), None)
