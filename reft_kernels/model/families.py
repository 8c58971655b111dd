"""Exceptions for architectures, by ``config.model_type``, each with its reason.

Names are those of transformers. Model types that are not listed follow the rules that
:mod:`reft_kernels.model.roles` derives from the structure of a block.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from torch import nn

_MAPS = "its stages hold feature maps [B, C, H, W], not rows of tokens"
_GRIDS = "its blocks hold a grid [B, H, W, d], not rows of tokens"
_MIXED = "its hidden state holds an image's rows beside the tokens, which positions do not count"

UNSUPPORTED_FAMILIES: dict[str, str] = {
    "squeezebert": "its blocks are run past every hook, by block.forward(), and hold [B, d, T]",
    "funnel": "its blocks are lists in lists, and pool the sequence between them",
    "reformer": "its blocks are reversible: they hold two streams and run again in the backward",
    "perceiver": "its blocks hold latents, which are not the tokens of the input",
    "canine": "its blocks hold characters pooled into molecules, not the tokens of the input",
    "cpmant": "its hidden state holds rows of a prompt of its own before the tokens",
    "bridgetower": "its vision blocks hold rows first, and its towers are merged between blocks",
    "vilt": _MIXED,
    "git": _MIXED,
    "visual_bert": _MIXED,
    "layoutlmv2": _MIXED,
    "layoutlmv3": _MIXED,
    "flava_multimodal_model": _MIXED,
    "udop": _MIXED,
    "sam_vision_model": _GRIDS,
    "vitdet": _GRIDS,
    "dinat": _GRIDS,
    "hiera": "its stages reorder and pool the rows of the image",
    "segformer": _MAPS,
    "glpn": _MAPS,
    "cvt": _MAPS,
    "pvt": _MAPS,
    "pvt_v2": _MAPS,
    "levit": "its stages run as one flat list and subsample the rows between blocks",
    "swiftformer": _MAPS,
    "efficientformer": _MAPS,
    "mobilevit": _MAPS,
    "mobilevitv2": _MAPS,
    "poolformer": _MAPS,
    "van": _MAPS,
    "florence_vision": _MAPS,
    "resnet": _MAPS,
    "regnet": _MAPS,
    "bit": _MAPS,
    "convnext": _MAPS,
    "convnextv2": _MAPS,
    "dinov3_convnext": _MAPS,
    "efficientnet": _MAPS,
    "mobilenet_v1": _MAPS,
    "mobilenet_v2": _MAPS,
    "textnet": _MAPS,
    "hgnet_v2": _MAPS,
    "timm_backbone": "its blocks are those of another package, of any layout",
    "timm_wrapper": "its blocks are those of another package, of any layout",
}
"""Architectures without any editable module: hooks would not run, or rows would not be tokens."""

_NO_BLOCKS = (
    "its attentions and feed-forwards are two lists, and there is no list of blocks; name "
    "'attentions.{layer}' or 'ffns.{layer}'"
)
FAMILIES_WITHOUT_ROLES: dict[str, str] = {"xlm": _NO_BLOCKS, "flaubert": _NO_BLOCKS}
"""Architectures in which roles are undefined; module paths can be used."""


class UnsupportedTarget(NamedTuple):
    """Modules of some architectures that cannot be edited.

    Attributes:
        model_types: values of ``config.model_type``.
        names: parts of a module path; matches the modules of these names and those below. Empty:
            every module.
        reason: why, for the error message.
        side: "encoder" or "decoder" of an encoder-decoder model; None: both.
        last: match only the output of the named modules, not the modules below.
    """

    model_types: tuple[str, ...]
    names: tuple[str, ...]
    reason: str
    side: str | None = None
    last: bool = False


_FIRST = "it reads the sequence first, [T, B, d]"
UNSUPPORTED_TARGETS: tuple[UnsupportedTarget, ...] = (
    UnsupportedTarget(
        ("prophetnet", "xlm-prophetnet"),
        (),
        "the decoder's hidden state holds the predicting streams behind the tokens, [B, (1 + "
        "ngram) * T, d]",
        side="decoder",
    ),
    UnsupportedTarget(
        ("pegasus_x",),
        ("self_attn",),
        "every second layer shifts the rows by half a block before its attention",
        side="encoder",
    ),
    UnsupportedTarget(
        ("pegasus_x",),
        ("fc1", "fc2", "final_layer_norm"),
        "it runs twice in a layer, for the tokens and for the global tokens",
        side="encoder",
    ),
    UnsupportedTarget(
        ("longformer", "led"),
        ("query", "key", "value", "query_global", "key_global", "value_global"),
        _FIRST,
    ),
    UnsupportedTarget(
        ("deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4"),
        ("attn_hc", "ffn_hc", "hc_head"),
        "it holds the weights that mix the residual streams, not a hidden state",
    ),
    UnsupportedTarget(
        ("deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4"),
        ("compressor", "indexer", "o_a_proj"),
        "its rows are windows or groups, not tokens",
    ),
    UnsupportedTarget(
        ("swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr", "clap_audio_model"),
        ("attention",),
        "it runs on windows, [B * windows, rows, d], which shift from block to block",
    ),
    UnsupportedTarget(
        ("ibert",),
        ("attention",),
        "it returns a tuple in a tuple; name 'attention.output'",
        last=True,
    ),
)

PADDED: dict[str, str | None] = {
    "longformer": None,
    "big_bird": None,
    "led": "encoder",
    "pegasus_x": "encoder",
    "bigbird_pegasus": "encoder",
}
"""Architectures that pad the sequence on the right, to a multiple of a window or block.

The value is the padded side of an encoder-decoder model; None: both.
"""

TIME_FIRST: dict[str, str | None] = {"xlnet": None, "fsmt": "layers"}
"""Architectures with hidden states ``[T, B, d]``, in the module list of that name; None: all."""

NARROW: dict[str, str] = {"mobilebert": "true_hidden_size"}
"""Configuration value with the width inside a block, if narrower than between blocks."""

SIDE_BY_SIDE: dict[str, str] = {"qwen4_exp_text": "hc_count"}
"""Configuration value with the number of streams concatenated between blocks.

Hidden states there are ``[B, T, streams * d]``.
"""


def config_of(model: nn.Module, path: str) -> Any:
    """The configuration of the innermost module at or above ``path`` that has one, or None."""
    parts = path.split(".") if path else []
    for depth in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:depth])), "config", None)
        if getattr(config, "model_type", None) or hasattr(config, "hidden_size"):
            return config
    return None


def model_type_of(model: nn.Module, path: str) -> str:
    """``model_type`` of :func:`config_of`; empty if there is none."""
    return str(getattr(config_of(model, path), "model_type", None) or "")


def unsupported_family_reason(kind: str) -> str | None:
    """Why nothing in an architecture can be edited, or None."""
    if kind == "lilt" and transformers_version() < 5:
        return (
            "its blocks return the text's and the layout's states in a tuple of their own before "
            "transformers 5"
        )
    return UNSUPPORTED_FAMILIES.get(kind)


def transformers_version() -> int:
    version = getattr(sys.modules.get("transformers"), "__version__", "5")
    return int(version.split(".")[0])


def unsupported_target_reason(
    model: nn.Module, path: str, where: str, side: str | None
) -> str | None:
    """The reason why the architecture of a module does not allow an edit there, or None.

    Args:
        model: the model.
        path: module path.
        where: "input" or "output" of the module.
        side: "encoder" or "decoder" in an encoder-decoder model, else None.
    """
    kind = model_type_of(model, path)
    if unsupported_family_reason(kind) is not None:
        return f"{kind}: {unsupported_family_reason(kind)}"
    parts = path.split(".")
    for target in UNSUPPORTED_TARGETS:
        if kind not in target.model_types or target.side not in (None, side):
            continue
        if target.last:
            hit = parts[-1] in target.names and where == "output"
        else:
            hit = not target.names or any(name in parts for name in target.names)
        if hit:
            return f"{kind}: {target.reason}"
    return None


def layout_of(model: nn.Module, path: str, tower: str, is_block: bool, side: str | None) -> str:
    """The ``layout`` of a :class:`~reft_kernels.model.components.Target`.

    Args:
        model: the model.
        path: module path of the target.
        tower: path of the module that runs the blocks.
        is_block: whether the target is a block.
        side: "encoder" or "decoder" in an encoder-decoder model, else None.
    """
    kind = model_type_of(model, path)
    inside = path.startswith(f"{tower}.") or not tower
    if is_block:
        classes = [type(child).__name__ for child in model.get_submodule(path).children()]
        if any(name.endswith("HyperConnection") for name in classes):
            return "btsd"
        if any(name.endswith("AltUp") for name in classes):
            return "sbtd"
    if inside and kind in TIME_FIRST:
        name = TIME_FIRST[kind]
        if name is None or name in path.split("."):
            return "tbd"
    if inside and kind in PADDED and PADDED[kind] in (None, side):
        return "btd_padded"
    return "btd"
