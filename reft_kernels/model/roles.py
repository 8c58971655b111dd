"""The parts of a block by their names and classes, and what roles mean in terms of them."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from torch import nn

from reft_kernels.model.widths import own_width

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
    r"(Mixer|DeltaNet|DeltaAttention|LightningAttention|ShortConv(olution)?|ConvolutionModule|RecurrentBlock|"
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
    r"^(k|v|kv|key|value|c_attn|Wkv|(k|v|kv|key|value|to_k|to_v)_(proj|lin|norm|layernorm)|to_[kv])$"
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
    """A place in a block: the module's path from the block ("" is the block) and "input" or
    "output".
    """

    path: str
    side: str


class Part(NamedTuple):
    """One part of a block. ``pair``: a feed-forward that is two layers of the block, by their
    paths.
    """

    kind: str
    path: str
    module: nn.Module
    pair: tuple[str, str] | None = None


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module is attention to another sequence, by the last part of its path and its
    class.
    """
    kind = type(module).__name__
    if isinstance(module, _CONTAINERS):
        return False
    return kind.endswith("CrossAttention") or (
        "Att" in kind and _CROSS_NAMES.search(name) is not None
    )


def _kind(name: str, module: nn.Module, block_class: str) -> str | None:
    kind = type(module).__name__
    if is_cross_attention(name, module):
        return "cross"
    # a family may be called Linear itself: KimiLinearAttention is the attention of
    # KimiLinearDecoderLayer
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
    """The two layers of a feed-forward that stand in the block itself, as BERT's and BART's do."""
    children = dict(module.named_children())
    for first, last in _FLAT:
        if first in children and last in children:
            inner = f"{last}.dense" if hasattr(children[last], "dense") else last
            if own_width(module.get_submodule(inner), "input") is not None:
                return first, inner
    return None


def parts(block: nn.Module) -> list[Part]:
    """The parts of a block, in order; what is in a part is not looked at."""
    found: list[Part] = []

    def walk(module: nn.Module, prefix: str) -> None:
        pair = _flat_pair(module)
        if pair is not None:
            first, last = (f"{prefix}{name}" for name in pair)
            found.append(Part("mlp", first, block.get_submodule(first), (first, last)))
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
                found.append(Part(kind, path, child))

    walk(block, "")
    return found


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
    """Path of the projection that a feed-forward ends with: back to the width of the residual
    stream.
    """
    found = [
        (name, own_width(m, "output"))
        for name, m in module.named_modules()
        if name
        and getattr(m, "weight", None) is not None
        and m.weight.dim() == 2
        and own_width(m, "input")
    ]
    back = [name for name, out in found if width is None or out == width]
    return (back or [None])[-1]


def _only(found: list[Part], part: str) -> Part | str:
    """The one part of a kind, or why there is none."""
    word = _WORDS[part]
    same = [p for p in found if p.kind == part]
    if part == "mlp":
        same += [p for p in found if p.kind == "experts"]
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
    if part == "attention" and any(p.kind == "cross" for p in found):
        return (
            "has no such part: it has no self-attention, but cross-attention, which is named by "
            "path"
        )
    return f"has no such part: it has no {word}"


def find_role(block: nn.Module, role: str, width: int | None = None) -> Place | str:
    """The place that a role means in a block, or why it means none, in words.

    Args:
        width: of the residual stream, which tells a feed-forward's last projection.
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
            f"is a mixture of experts, which has no single activation ({only.path!r}): each "
            "expert's are of its own "
            "tokens; mlp_input and mlp_output are its whole input and output"
        )
    last = _last_projection(only.module, width)
    return (
        "has a feed-forward without a last projection"
        if last is None
        else Place(f"{only.path}.{last}", "input")
    )


def why_unfit(model: nn.Module, path: str, stream: str) -> str | None:
    """Why the module at a path has no row for each token, whatever its architecture, or None."""
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
    """Whether a block is convolutional: it holds channels first, [B, C, T] or [B, C, H, W]."""
    kinds = {p.kind for p in parts(block)}
    if "attention" in kinds or "mixer" in kinds:
        return False
    if any(isinstance(m, nn.Conv2d | nn.BatchNorm2d) for m in block.modules()):
        return True
    return not kinds and any(isinstance(m, nn.Conv1d) for m in block.modules())
