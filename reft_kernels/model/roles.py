"""Finds the module of a role in a block, from names and classes of its submodules."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from torch import nn

from reft_kernels.model.widths import is_matrix, own_width

ROLES = (
    "block_output",
    "block_input",
    "attention_output",
    "attention_input",
    "mlp_output",
    "mlp_input",
    "mlp_activation",
    "mixer_output",
    "mixer_input",
)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_ATTENTION = re.compile(r"(Attention|Attn|MLA)\d*$")
_MIXER = re.compile(
    r"(Mixer|DeltaNet|DeltaAttention|LightningAttention|ShortConv(olution)?|ConvolutionModule|"
    r"RecurrentBlock|"
    r"MambaLayer|Mamba\d*|SSM|[xm]LSTMLayer|FourierTransform|Retention)$|^Rwkv\w*Attention$"
)
_MLP_NAMES = (
    "mlp",
    "feed_forward",
    "feedforward",
    "ffn",
    "ff",
    "mlp_block",
    "block_sparse_moe",
    "moe",
)
_MLP = re.compile(
    r"(MLP|Mlp|FeedForward|FFN|LayerFF|MoE|Moe|MOE|DenseActDense|DenseGatedActDense|SwiGLU)"
    r"(Block|Layer|Network)?\d*$"
)
_CROSS_NAMES = re.compile(r"cross_?att|^encoder_att|^encdecattention$|^x_attn$", re.IGNORECASE)
_EXPERTS = re.compile(r"Experts$")
_ROUTER = re.compile(r"(Router|Gating)$")
_EXPERT_NAME = re.compile(r"^(routed_)?experts$|^expert_\d+$")
_KEYS_VALUES = re.compile(
    r"^(k|v|kv|key|value|c_attn|Wkv|to_[kv]|"
    r"(k|v|kv|key|value|to_k|to_v)_(proj|lin|norm|layernorm))$"
)
_FLAT = (
    ("intermediate", "output"),
    ("fc1", "fc2"),
    ("ffn", "ffn_output"),
    ("linear1", "linear2"),
    ("lin1", "lin2"),
)

_WORDS = {
    "attention": "self-attention",
    "mlp": "feed-forward",
    "mixer": "token mixer that is no attention",
}


class Place(NamedTuple):
    """A place in a block.

    Attributes:
        path: path of the module relative to the block; "" is the block.
        side: "input" or "output".
    """

    path: str
    side: str


class Part(NamedTuple):
    """One part of a block.

    Attributes:
        kind: "attention", "cross", "mixer", "mlp" or "experts".
        path: path of the module relative to the block.
        module: the module; the first one for a pair.
        pair: paths of the two layers of a feed-forward without a module of its own.
    """

    kind: str
    path: str
    module: nn.Module
    pair: tuple[str, str] | None = None


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is cross-attention.

    Args:
        name: last part of the module's path.
        module: the module.
    """
    kind = type(module).__name__
    if isinstance(module, _CONTAINERS):
        return False
    return kind.endswith("CrossAttention") or (
        "Att" in kind and _CROSS_NAMES.search(name) is not None
    )


def _kind(name: str, module: nn.Module, block_class: str) -> str | None:
    """The kind of :class:`Part` of a module; None if it is not a part."""
    kind = type(module).__name__
    if is_cross_attention(name, module):
        return "cross"
    # "Linear" may belong to the family's name: KimiLinearAttention of KimiLinearDecoderLayer
    if _MIXER.search(kind) or kind[len(os.path.commonprefix([kind, block_class])) :].endswith(
        "LinearAttention"
    ):
        return "mixer"
    if _ATTENTION.search(kind):
        return "attention"
    if _EXPERTS.search(kind) or _EXPERT_NAME.match(name):
        return "experts"
    if next(module.children(), None) is not None and (
        name.lower() in _MLP_NAMES or _MLP.search(kind)
    ):
        return "mlp"
    return None


def _flat_pair(module: nn.Module) -> tuple[str, str] | None:
    """The two layers of a feed-forward that are direct children of a block, as in BERT and BART."""
    children = dict(module.named_children())
    for first, last in _FLAT:
        if first in children and last in children:
            inner = f"{last}.dense" if hasattr(children[last], "dense") else last
            if own_width(module.get_submodule(inner), "input") is not None:
                return first, inner
    return None


def parts(block: nn.Module) -> list[Part]:
    """The outermost parts of a block, in order."""
    block_parts: list[Part] = []

    def walk(module: nn.Module, prefix: str) -> None:
        pair = _flat_pair(module)
        if pair is not None:
            first, last = (f"{prefix}{name}" for name in pair)
            block_parts.append(Part("mlp", first, block.get_submodule(first), (first, last)))
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            listed = isinstance(child, nn.ModuleList | nn.ModuleDict)
            kind = (
                None
                if listed and not _EXPERT_NAME.match(name)
                else _kind(name, child, type(block).__name__)
            )
            if kind is None:
                walk(child, f"{path}.")
            else:
                block_parts.append(Part(kind, path, child))

    walk(block, "")
    return block_parts


def is_mixture(module: nn.Module) -> bool:
    """Whether a feed-forward routes tokens to experts."""
    return any(
        _EXPERT_NAME.match(name.rsplit(".", 1)[-1])
        or _EXPERTS.search(type(m).__name__)
        or _ROUTER.search(type(m).__name__)
        for name, m in module.named_modules()
        if name
    )


def _last_projection(module: nn.Module, width: int | None) -> str | None:
    """Path of a feed-forward's last projection, the one back to the residual stream, or None.

    Args:
        module: the feed-forward.
        width: width of the residual stream; None if unknown.
    """
    projections = [
        name
        for name, m in module.named_modules()
        if name
        and is_matrix(getattr(m, "weight", None))
        and own_width(m, "input")
        and (width is None or own_width(m, "output") == width)
    ]
    return projections[-1] if projections else None


def _only(block_parts: list[Part], part: str) -> Part | str:
    """The only part of a kind, or the reason why there is none, as text."""
    word = _WORDS[part]
    same = [p for p in block_parts if p.kind == part]
    if part == "mlp":
        same += [p for p in block_parts if p.kind == "experts"]
    if len(same) == 1 and same[0].kind == part:
        return same[0]
    if same and all(p.kind == "experts" for p in same):
        return (
            f"routes to experts in the block itself ({same[0].path!r}), and no module is its "
            "whole feed-forward"
        )
    if same:
        names = ", ".join(repr(p.path) for p in same[:6])
        return (
            f"has more than one {word}, none of which is the whole ({names}); name one of them by "
            "path"
        )
    if part == "attention" and any(p.kind == "cross" for p in block_parts):
        return (
            "has no such part: it has no self-attention, but cross-attention, which is named by "
            "path"
        )
    return f"has no such part: it has no {word}"


def find_role(block: nn.Module, role: str, width: int | None = None) -> Place | str:
    """The place of a role in a block.

    Args:
        block: the block.
        role: one of :data:`ROLES`.
        width: width of the residual stream, to find a feed-forward's last projection.

    Returns:
        The reason, as text, if the role is not defined in the block.
    """
    part, side = role.rsplit("_", 1)
    if part == "block":
        return Place("", side)
    only = _only(parts(block), part)
    if isinstance(only, str):
        return only
    if only.pair is not None:
        first, last = only.pair
        return {
            "input": Place(first, "input"),
            "activation": Place(last, "input"),
            "output": Place(last, "output"),
        }[side]
    if side != "activation":
        return Place(only.path, side)
    if is_mixture(only.module):
        return (
            f"is a mixture of experts, which has no single activation ({only.path!r}): each expert "
            "runs on its own tokens; mlp_input and mlp_output are its whole input and output"
        )
    projection = _last_projection(only.module, width)
    if projection is None:
        return "has a feed-forward without a last projection"
    return Place(f"{only.path}.{projection}", "input")


def unsuitable_reason(model: nn.Module, path: str, stream: str) -> str | None:
    """The reason why a module does not have one row per token in any architecture, or None.

    Args:
        model: the model.
        path: path of the module.
        stream: see :class:`~reft_kernels.model.components.Target`.
    """
    names = path.split(".")
    chain = [model.get_submodule(".".join(names[: n + 1])) for n in range(len(names))]
    for name, module in zip(names, chain, strict=True):
        if _EXPERT_NAME.match(name) or _EXPERTS.search(type(module).__name__):
            return (
                "an expert sees the tokens that were routed to it alone, in an order of their "
                "own; name the whole feed-forward"
            )
    last = chain[-1]
    parent = chain[-2] if len(chain) > 1 else model
    routes = names[-1] in ("gate", "router") and hasattr(parent, "experts")
    if routes or _ROUTER.search(type(last).__name__):
        return "it gives routing scores, not a hidden state; name the whole feed-forward"
    if isinstance(last, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
        return "it holds channels first, [B, C, ...]"
    crossing = any(
        is_cross_attention(name, m) for name, m in zip(names[:-1], chain[:-1], strict=True)
    )
    if crossing and stream == "tokens" and _KEYS_VALUES.match(names[-1]):
        return (
            "it reads the encoder's states, or an image's: keys and values of cross-attention are "
            "no rows of these tokens"
        )
    head = getattr(parent, "head_dim", None)
    weight = getattr(last, "weight", None)
    if (
        isinstance(head, int)
        and "norm" in names[-1]
        and weight is not None
        and tuple(weight.shape) == (head,)
    ):
        outs = [own_width(m, "output") for m in parent.children() if not isinstance(m, type(last))]
        if any(out is not None and out != head for out in outs):
            return "it runs on each head, [B, heads, T, d], not on rows of tokens"
    return None


def holds_maps(block: nn.Module) -> bool:
    """Whether a block is convolutional, with hidden states ``[B, C, T]`` or ``[B, C, H, W]``."""
    kinds = {p.kind for p in parts(block)}
    if "attention" in kinds or "mixer" in kinds:
        return False
    if any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in block.modules()):
        return True
    return not kinds and any(isinstance(m, nn.Conv1d) for m in block.modules())
