"""What is special about single architectures: those whose blocks cannot be edited right, and layouts of hidden states.

Keyed by ``config.model_type``. Everything else is found by structure.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

REFUSED: dict[str, str] = {
    "squeezebert": "its layers are called by their forward, past hooks, and hold [B, d, T]",
    "funnel": "its blocks are lists that are never called, and its sequence is pooled in between",
    "reformer": "its reversible layers recompute their inputs in the backward, from outputs that an edit has changed",
    "vilt": "its sequence holds text and image patches together, so the text's positions do not count it",
}
"""Architectures that are refused when an adapter is attached, with the reason."""

WITHOUT_BLOCKS: dict[str, str] = {
    "xlm": "its layers are parallel lists (attentions, ffns) and no modules; name one by path: 'transformer.ffns.{layer}'",
    "flaubert": "its layers are parallel lists (attentions, ffns) and no modules; name one by path: 'transformer.ffns.{layer}'",
}
"""Architectures without modules that roles could mean, with what to name instead."""

_LAYOUTS: dict[str, tuple[str, str]] = {
    "xlnet": ("tbd", "inside"),
    "deepseek_v4": ("btsd", "block"),
    "gemma3n": ("sbtd", "block"),
    "gemma3n_text": ("sbtd", "block"),
    **dict.fromkeys(("longformer", "led", "big_bird", "bigbird_pegasus", "pegasus_x"), ("btd_padded", "inside")),
}
"""Layout of hidden states, of a block's own input and output alone ("block") or of everything inside it too ("inside")."""

_INSIDE_REFUSED: dict[str, str] = {
    "ibert": "its modules return pairs of a quantized tensor and a scale",
    "mobilebert": "its blocks have several feed-forwards, and work in a bottleneck of another width",
}
_SEQUENCES = {"nystromformer"}  # convolve in two dimensions over heads and tokens

_OWN_ROWS = re.compile(
    r"vision|visual|image|audio|speech|projector|projection|connector|merger|resampler|q_?former|perceiver|abstractor|aligner",
    re.IGNORECASE,
)
_EXPERT = re.compile(r"(^|\.)\w*experts\.(\d+|\w+)(\.|$)")
_CROSS_STATES = re.compile(
    r"(^|\.)(encoder_attn|crossattention|cross_attn|cross_attention|EncDecAttention|multihead_attn)(\.\w+)*"
    r"\.(k_proj|v_proj|kv_proj|k|v|key|value)$"
)


def model_types(model: nn.Module) -> list[str]:
    """The model types of a model's configuration and of the parts that it holds."""
    config = getattr(model, "config", None)
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "encoder", "decoder"))]
    return [part.model_type for part in parts if isinstance(getattr(part, "model_type", None), str)]


def layout_of(model_type: str | None, is_block: bool) -> str:
    """The layout of a place's hidden state, as :func:`reft_kernels.model.selection.place_rows` names it."""
    layout, extent = _LAYOUTS.get(model_type or "", ("btd", "inside"))
    return layout if is_block or extent == "inside" else "btd"


def stream_of(path: str) -> str:
    """ "own" for a module of a vision or audio tower or a projector, whose rows are not the text's tokens; else "tokens"."""
    return "own" if any(_OWN_ROWS.search(part) for part in path.split(".")) else "tokens"


def check_path(path: str) -> None:
    """Refuse places whose rows are not a sequence's.

    Raises:
        ValueError: a module of one expert, or the keys or values of cross-attention.
    """
    if _EXPERT.search(path):
        raise ValueError(
            f"component: got {path!r}, a module of a mixture's expert, which sees only the tokens that are routed to it; "
            "name the mixture itself, as 'mlp_output' does"
        )
    if _CROSS_STATES.search(path):
        raise ValueError(
            f"component: got {path!r}, which reads the encoder's states and not the decoder's tokens; "
            "edit 'encoder.block_output', or the cross-attention's output"
        )


def check_role(model_type: str | None, role: str) -> None:
    """Refuse the roles inside a block that an architecture gives another meaning.

    Raises:
        ValueError: such a role.
    """
    reason = _INSIDE_REFUSED.get(model_type or "")
    if reason is not None and not role.startswith("block_"):
        raise ValueError(f"component: got {role!r}, which {model_type} does not have: {reason}; use 'block_output'")


def holds_images(block: nn.Module, model_type: str | None) -> bool:
    """Whether a block's hidden state is an image ``[B, C, H, W]``: it convolves in two dimensions."""
    return model_type not in _SEQUENCES and any(isinstance(module, nn.Conv2d) for module in block.modules())


def own_config(model: nn.Module, path: str) -> list[Any]:
    """The configurations of the modules around ``path``, the nearest first."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    return [m.config for m in around if getattr(m, "config", None) is not None]
