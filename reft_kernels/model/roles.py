"""What a role means inside a block: the attention, the token mixer that is no attention, the feed-forward.

attention_*      the block's self-attention; never cross-attention, never a linear attention or a state-space mixer
mixer_*          the token mixer that is no attention: state space, linear attention, short convolution, recurrence
mlp_input,       of the whole feed-forward; in a mixture of experts router, routed experts and shared experts together,
mlp_output       what is added to the residual stream
mlp_activation   what the last projection of a dense feed-forward reads; a mixture has none
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from reft_kernels.model.widths import is_stage, own_width

_MIXER = re.compile(
    r"(Mixer|GatedDeltaNet|DeltaNet|Delta\w*Attention|LightningAttention|(?<!Kimi)LinearAttention|ShortConv|RecurrentBlock|mLSTMLayer|"
    r"RwkvSelfAttention|MambaLayer|FourierTransform)$"
)
_CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)
_MLP_NAMES = ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe", "moe", "ff")
_MLP_KINDS = ("MLP", "Mlp", "FeedForward", "LayerFF", "MoE", "Moe", "SparseMoeBlock")
_BESIDE = re.compile(r"^(shared_mlp|shared_experts?|mlps|residual_mlp)$")


class Place(NamedTuple):
    """A module's path within a block, and its side."""

    path: str
    side: str


class Absent(NamedTuple):
    """Why a block has no such place."""

    reason: str


def _outermost(block: nn.Module, wanted) -> list[str]:
    """Paths of the modules that ``wanted`` accepts, those inside another one left out; containers are never called."""
    found: list[str] = []
    for name, module in block.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and not isinstance(module, nn.ModuleList | nn.ModuleDict) and wanted(name, module):
            found.append(name)
    return found


def _single(names: list[str], part: str) -> str | Absent:
    if not names:
        return Absent(f"it has no {part}")
    if len(names) > 1:
        return Absent(f"it has several of them ({', '.join(names[:6])}); name one by path")
    return names[0]


def _is_attention(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind.endswith("Attention") and not _MIXER.search(kind) and not (_CROSS.search(name) or "Cross" in kind)


def is_mixture(module: nn.Module) -> bool:
    """Whether a feed-forward routes its tokens to experts."""
    names = (f"{name} {type(m).__name__}".lower() for name, m in module.named_modules())
    return any("expert" in name or "router" in name or "moe" in name.split(" ")[1] for name in names)


def _feed_forward(block: nn.Module) -> str | Absent:
    def wanted(name: str, module: nn.Module) -> bool:
        last = name.rsplit(".", 1)[-1]
        return (last.lower() in _MLP_NAMES or type(module).__name__.endswith(_MLP_KINDS)) and not _BESIDE.match(last)

    beside = [name for name, module in block.named_children() if _BESIDE.match(name)]
    found = _outermost(block, wanted)
    if found and beside:
        return Absent(f"its feed-forward stands in the block in parts ({', '.join([*found[:3], *beside])}); name one by path")
    return _single(found, "feed-forward module")


def _spread_feed_forward(block: nn.Module, side: str) -> Place | None:
    """A feed-forward whose two projections stand apart: in the block (BERT, BART, OPT), or in a layer of it (ALBERT)."""
    for name, module in block.named_modules():
        children = dict(module.named_children())
        if not name and "fc1" in children and "fc2" in children:
            first, last = "fc1", "fc2"
        elif not name and "intermediate" in children and hasattr(children.get("output"), "dense") and "ffn" not in children:
            first, last = "intermediate", "output.dense"
        elif isinstance(children.get("ffn"), nn.Linear) and "ffn_output" in children:
            first, last = "ffn", "ffn_output"
        else:
            continue
        choices = {"input": (first, "input"), "activation": (last, "input"), "output": (last, "output")}
        path, where = choices[side]
        return Place(f"{name}.{path}".strip("."), where)
    return None


def _last_projection(module: nn.Module, prefix: str) -> str | None:
    names = [name for name, m in module.named_modules() if own_width(m, "input") and m.weight.dim() == 2]
    return f"{prefix}.{names[-1]}".strip(".") if names else None


def find_role(block: nn.Module, role: str) -> Place | Absent:
    """The place within a block that a role means, or why it has none."""
    part, side = role.rsplit("_", 1)
    if part == "block":
        return Place("", side)
    if is_stage(block):
        return Absent(
            "it is a stage of several blocks, whose parts work in windows of the image; only block roles are supported"
        )
    if part in ("attention", "mixer"):
        wanted = _is_attention if part == "attention" else lambda name, module: _MIXER.search(type(module).__name__)
        path = _single(_outermost(block, wanted), "self-attention" if part == "attention" else "such token mixer")
        return path if isinstance(path, Absent) else Place(path, side)
    spread = _spread_feed_forward(block, side)
    if spread is not None:
        return spread
    path = _feed_forward(block)
    if isinstance(path, Absent):
        return path
    if side != "activation":
        return Place(path, side)
    module = block.get_submodule(path)
    if is_mixture(module):
        return Absent(f"its feed-forward ({path}) is a mixture of experts, which has no single activation; use mlp_output")
    projection = _last_projection(module, path)
    return Absent(f"its feed-forward ({path}) has no projection") if projection is None else Place(projection, "input")
