"""Determines the width of a hidden state from nearby weights or the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from reft_kernels.base_model import text_config
from reft_kernels.model.families import NARROW, SIDE_BY_SIDE, config_of, model_type_of

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
_PASSIVE = ("Dropout", "Identity", "DropPath", "Norm")  # classes that keep the width


def read(config: Any, names: Iterable[str]) -> int | None:
    """The first of a configuration's attributes ``names`` that is a positive integer, or None."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def is_matrix(weight: Any) -> bool:
    """Whether a weight is a matrix, as of a linear layer."""
    return weight is not None and weight.dim() == 2


def own_width(module: nn.Module, side: str) -> int | None:
    """Width of a module's input or output according to its own weight.

    Args:
        module: a linear layer, an embedding, a norm or any other module.
        side: "input" or "output".

    Returns:
        None if the module has no weight that determines the width.
    """
    features = getattr(module, "in_features" if side == "input" else "out_features", None)
    if isinstance(features, int):
        return features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "output" else None
    weight = getattr(module, "weight", None)
    if weight is None or isinstance(module, nn.PReLU):
        return None
    # transformers' Conv1D has a weight [in, out]
    if isinstance(getattr(module, "nf", None), int) and weight.dim() == 2:
        return weight.shape[0 if side == "input" else 1]
    return weight.shape[0] if weight.dim() == 1 else None


def _norm_width(module: nn.Module) -> int | None:
    """Width of a norm; None for other modules."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    return weight.shape[0] if "norm" in type(module).__name__.lower() else None


def _first_norms(block: nn.Module) -> list[int]:
    """Widths of the outermost norms of a block; inner ones may belong to a head or bottleneck."""
    level = [block]
    while level:
        children = [(name, child) for module in level for name, child in module.named_children()]
        widths = [w for _, child in children if (w := _norm_width(child)) is not None]
        if widths:
            return widths
        level = [child for name, child in children if name != "downsample"]
    return []


def stream_width(model: nn.Module, path: str, block: nn.Module, side: str = "output") -> int | None:
    """Width of the residual stream at a block.

    Read from the block's norms; if they disagree or have no weight, from the configuration of the
    tower that contains the block.

    Args:
        model: the model.
        path: path of the block.
        block: the block.
        side: "input" or "output"; they differ if the block changes the width.

    Returns:
        None if the width is unknown.
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


def between_blocks(
    model: nn.Module, path: str, block: nn.Module, side: str = "output"
) -> int | None:
    """Width of the hidden state between blocks.

    It is the width of the residual stream, or of several concatenated streams
    (:data:`~reft_kernels.model.families.SIDE_BY_SIDE`). The arguments are those of
    :func:`stream_width`.
    """
    count = SIDE_BY_SIDE.get(model_type_of(model, path))
    if count is None:
        return stream_width(model, path, block, side)
    config = config_of(model, path)
    width, streams = read(config, _WIDTH_NAMES), read(config, (count,))
    return None if width is None or streams is None else width * streams


def _single_projection(module: nn.Module) -> nn.Module | None:
    """The projection of a module that consists of one projection and norms, or None."""
    projections = [m for m in module.modules() if is_matrix(getattr(m, "weight", None))]
    if len(projections) != 1 or own_width(projections[0], "input") is None:
        return None
    counted = sum(
        p.numel()
        for m in module.modules()
        if m in projections or _norm_width(m) is not None
        for p in m.parameters(recurse=False)
    )
    return projections[0] if counted == sum(p.numel() for p in module.parameters()) else None


def _end_width(module: nn.Module, side: str) -> int | None:
    """Width at the start or end of a chain of layers; None if a layer has no width of its own."""
    leaves = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    widths = [own_width(m, side) for m in leaves]
    if not leaves or any(w is None for w in widths):
        return None
    return widths[0 if side == "input" else -1]


def _own_parameters_fit(module: nn.Module, width: int) -> int | None:
    """The width after a module's own parameters: tables of ``width`` leave it, one matrix turns
    it.
    """
    other = [
        p
        for p in module.parameters(recurse=False)
        if p.dim() and p.shape[-1] != width and p.numel() > 1
    ]
    if not other:
        return width
    (matrix, *more) = other
    if more or matrix.dim() != 2 or matrix.shape[0] != width:
        return None
    return matrix.shape[1]


def _last_width(module: nn.Module) -> int | None:
    """Width of a module's output by its last part with parameters, in the order of registration.

    None where that part does not tell, where a parameter of the module itself has no place in it,
    and for pooling, whose rows are examples. The first forward compares it with the tensor's.
    """
    if "Pool" in type(module).__name__:
        return None
    own = own_width(module, "output")
    if own is not None:
        return own
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels
    inner = [m for m in module.children() if next(m.parameters(), None) is not None]
    width = _last_width(inner[-1]) if inner else None
    if inner and isinstance(inner[-1], nn.Embedding) and width not in map(_last_width, inner[:-1]):
        return None  # a table alone can be of several rows in one
    return None if width is None else _own_parameters_fit(module, width)


def _chain_width(block: nn.Module) -> int | None:
    """Width where a chain of projections and norms ends, such as a merger in a list of mergers;
    None if it is no chain.
    """
    leaves = [m for m in block.children() if next(m.parameters(), None) is not None]
    if len(leaves) < 2 or next(block.parameters(recurse=False), None) is not None:
        return None
    width = own_width(leaves[0], "input")
    for leaf in leaves:
        if width is None or own_width(leaf, "input") != width:
            return None
        width = own_width(leaf, "output")
    return width


def place_width(
    model: nn.Module,
    path: str,
    module: nn.Module,
    block_path: str | None,
    side: str,
    stated: int | None,
) -> int:
    """Width of the input or output of a module.

    Args:
        model: the model.
        path: path of the module.
        module: the module.
        block_path: path of the block that contains or is the module; None outside the blocks.
        side: "input" or "output".
        stated: the width that the user passed; takes precedence.

    Raises:
        ValueError: neither the weights nor the configuration determine the width.
    """
    width = stated
    if width is None and path == block_path:
        width = (_chain_width(module) if side == "output" else None) or between_blocks(
            model, path, module, side
        )
    elif width is None:
        width = own_width(module, side)
        if width is None and block_path is None:
            width = _end_width(module, side) or (_last_width(module) if side == "output" else None)
        elif width is None and block_path is not None:
            width = _width_in_block(model, path, module, block_path, side)
    if width is None:
        raise ValueError(
            f"embed_dim: got None, but the width of the {side} of {path!r} "
            f"({type(module).__name__}) is unknown; expected an integer: ReftConfig(embed_dim=...)"
        )
    return width


def _width_in_block(
    model: nn.Module, path: str, module: nn.Module, block_path: str, side: str
) -> int | None:
    """Width of a module inside a block that has no width of its own, or None."""
    single = _single_projection(module)
    if single is not None:
        return own_width(single, side)
    if side == "input":  # Zamba's attention reads the hidden state and the embeddings
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
