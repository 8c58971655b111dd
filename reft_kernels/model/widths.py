"""The width of a hidden state, from the weights around it and from the configuration of the
tower that holds it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from reft_kernels.model.families import NARROW, config_of, model_type_of

_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_READERS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv",
    "qkv_proj",
    "query_key_value",
    "Wqkv",
    "q_lin",
    "k_lin",
    "v_lin",
)
_PASSIVE = ("Dropout", "Identity", "DropPath", "Norm")  # without weights: what comes in goes out


def read(config, names: Iterable[str]) -> int | None:
    """The first of a configuration's values that is a positive integer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def text_config(config):
    """The part of a configuration that describes the text model."""
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def own_width(module: nn.Module, side: str) -> int | None:
    """Width of a module's input or output, from its own weight; None where the weight does not
    tell.
    """
    features = getattr(module, "in_features" if side == "input" else "out_features", None)
    if isinstance(features, int):
        return features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "output" else None
    weight = getattr(module, "weight", None)
    if weight is None or isinstance(module, nn.PReLU):
        return None
    if (
        isinstance(getattr(module, "nf", None), int) and weight.dim() == 2
    ):  # transformers' Conv1D: [in, out]
        return weight.shape[0 if side == "input" else 1]
    return weight.shape[0] if weight.dim() == 1 else None


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() == 1 and "norm" in type(module).__name__.lower()


def _first_norms(block: nn.Module) -> list[int]:
    """Widths of the norms that stand nearest to the block itself: inner ones may be of a head or
    a bottleneck.
    """
    level = [block]
    while level:
        children = [(name, child) for module in level for name, child in module.named_children()]
        found = [child.weight.shape[0] for _, child in children if _is_norm(child)]
        if found:
            return found
        level = [child for name, child in children if name != "downsample"]
    return []


def stream_width(model: nn.Module, path: str, block: nn.Module, side: str = "output") -> int | None:
    """Width of the residual stream at a block, None where nothing tells.

    The block's norms tell it; where they disagree, or have no weight, the configuration of the
    block's own tower does.

    Args:
        path: the block's path in ``model``.
        side: "input" or "output", which differ where a stage widens the stream.
    """
    reduction = getattr(getattr(block, "downsample", None), "reduction", None)
    if side == "output" and isinstance(reduction, nn.Module):
        return own_width(reduction, "output")
    config = config_of(model, path)
    stated = read(config, _WIDTH_NAMES) or read(text_config(config), _WIDTH_NAMES)
    if stated is not None and model_type_of(model, path) in NARROW:
        return stated
    norms = _first_norms(block)
    if norms and (len(set(norms)) == 1 or stated is None):
        return norms[0]
    if stated is not None:
        return stated
    return next(
        (w for w in (own_width(m, "input") for m in block.modules()) if w is not None), None
    )


def _single_projection(module: nn.Module) -> nn.Module | None:
    """The one projection of a module that has nothing else but norms."""
    two = [
        m
        for m in module.modules()
        if getattr(m, "weight", None) is not None and m.weight.dim() == 2
    ]
    if len(two) != 1 or own_width(two[0], "input") is None:
        return None
    known = sum(
        p.numel()
        for m in module.modules()
        if m in two or _is_norm(m)
        for p in m.parameters(recurse=False)
    )
    return two[0] if known == sum(p.numel() for p in module.parameters()) else None


def _end_width(module: nn.Module, side: str) -> int | None:
    """Width where a chain of layers begins or ends; None if it is not made of layers with widths
    alone.
    """
    leaves = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    widths = [own_width(m, side) for m in leaves]
    if not leaves or any(w is None for w in widths):
        return None
    return widths[0 if side == "input" else -1]


def place_width(
    model: nn.Module,
    path: str,
    module: nn.Module,
    block_path: str | None,
    side: str,
    stated: int | None,
) -> int:
    """Width of the input or output of the module at ``path``.

    Args:
        block_path: the block that holds the module, or is it; None outside the blocks.
        stated: what the user says, which wins.

    Raises:
        ValueError: neither the weights nor the configuration tell.
    """
    width = stated
    if width is None and path == block_path:
        width = stream_width(model, path, module, side)
    elif width is None:
        width = own_width(module, side)
        if width is None and block_path is None:
            width = _end_width(module, side)
        elif width is None:
            width = _width_in_block(model, path, module, block_path, side)
    if width is None:
        raise ValueError(
            f"embed_dim: cannot tell the width of the {side} of {path!r} "
            f"({type(module).__name__}); "
            "state it: ReftConfig(embed_dim=...)"
        )
    return width


def _width_in_block(
    model: nn.Module, path: str, module: nn.Module, block_path: str, side: str
) -> int | None:
    single = _single_projection(module)
    if single is not None:
        return own_width(single, side)
    if side == "input":  # Zamba's attention reads the embeddings beside the hidden state
        read_widths = {
            own_width(m, "input") for name, m in module.named_children() if name in _READERS
        }
        if len(read_widths) == 1 and None not in read_widths:
            return read_widths.pop()
    weightless = next(module.parameters(), None) is None
    nested = path.rsplit(".", 1)[0] != block_path
    if weightless and (nested or not type(module).__name__.endswith(_PASSIVE)):
        return None
    narrow = NARROW.get(model_type_of(model, path))
    if narrow is not None and not (side == "output" and hasattr(module, "bottleneck")):
        return read(config_of(model, path), (narrow,))
    return stream_width(model, block_path, model.get_submodule(block_path), "input")
