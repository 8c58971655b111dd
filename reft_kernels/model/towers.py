"""Finds the towers of a model: block lists, the language model, encoder and decoder, backbones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from reft_kernels.model.families import config_of
from reft_kernels.model.widths import read, text_config

TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
MODALITY_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_pixel_values",
    "input_values",
    "input_features",
    "audio_input_features",
    "audio_values",
    "flattened_patches",
    "past_values",
)
MODEL_INPUTS = (*TOKEN_INPUTS, *MODALITY_INPUTS)

_TRUE_INPUTS = tuple(name for name in MODEL_INPUTS if name != "inputs_embeds")
_LANGUAGE = ("language_model", "text_model", "thinker", "llm")
TOWERS = {
    "vision": re.compile(r"vision|visual|image|video|pixel", re.IGNORECASE),
    "audio": re.compile(r"audio|speech|sound", re.IGNORECASE),
}
"""Names of the towers of other modalities than text, and their modules' names."""
_CONNECTOR = re.compile(
    r"q_?former|perceiver|resampler|connector|projector|merger|abstractor|aligner", re.IGNORECASE
)
_MODALITY = re.compile(
    "|".join(["tower", *(p.pattern for p in (*TOWERS.values(), _CONNECTOR))]), re.IGNORECASE
)
_PROJECTOR = re.compile(
    r"^((multi_?modal|mm|vision|audio|image|speech|modality)_)?projector$|"
    r"^(language_projection|image_to_text_projection)$|"
    r"^(connector|merger|aligner|embed_vision|embed_audio)$",
    re.IGNORECASE,
)
_LOW_LEVEL = re.compile(r"conv|patch|vq|codec|feature_(extractor|encoder)", re.IGNORECASE)
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class BlockList(NamedTuple):
    """A list of blocks: its module path and its modules."""

    path: str
    blocks: nn.ModuleList


def size(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def of_modality(path: str) -> bool:
    """Whether a module belongs to an image or audio tower, or to a connector, by its path."""
    return any(_MODALITY.search(part) for part in path.split("."))


def block_lists(model: nn.Module) -> list[BlockList]:
    """The outermost lists of blocks; a list of experts inside a block is not one."""
    lists: list[BlockList] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer.path}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and size(module):
            lists.append(BlockList(path, module))
    return lists


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _language_root(model: nn.Module, lists: list[BlockList]) -> str:
    """Path of the language model in a model with several towers; "" is the model itself."""
    root = ""
    for path, _ in model.named_modules():
        inner = path and path != root and _below(path, root)
        if (
            inner
            and path.rsplit(".", 1)[-1] in _LANGUAGE
            and any(_below(b.path, path) for b in lists)
        ):
            root = path
    return root


def side_paths(model: nn.Module) -> dict[str, str]:
    """Paths of the encoder and decoder of a model or of its language model.

    Returns:
        Keys "encoder" and "decoder"; empty if the model is not an encoder-decoder model.
    """
    lists = block_lists(model)
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if "encoder" not in children or "decoder" not in children or of_modality(path):
            continue
        if not getattr(config_of(model, path), "is_encoder_decoder", False):
            continue
        sides = {side: f"{path}.{side}".lstrip(".") for side in ("encoder", "decoder")}
        if all(any(_below(b.path, inner) for b in lists) for inner in sides.values()):
            return sides
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {}
    names = {id(module): path for path, module in model.named_modules()}
    sides = {}
    for side in ("encoder", "decoder"):
        getter = getattr(model, f"get_{side}", None)
        path = names.get(id(getter()), "") if callable(getter) else ""
        if path:
            sides[side] = path
    return sides


def find_blocks(model: nn.Module, side: str | None = None) -> BlockList | None:
    """The blocks of a model's language model, or of its only tower.

    Among several lists, prefers those whose length is the number of layers in the configuration of
    their tower, then the one with the most parameters.

    Args:
        model: the model.
        side: "encoder" or "decoder" of an encoder-decoder model; a name of :data:`TOWERS`; None
            means the language model, and of an encoder-decoder model the encoder.

    Returns:
        None if the model has no list of blocks.
    """
    candidates = block_lists(model)
    if side in TOWERS:
        within = [c for c in candidates if side in towers_of(c.path)]
        unfit = (_CONNECTOR, _LOW_LEVEL)
        candidates = [c for c in within if not any(p.search(c.path) for p in unfit)]
        return max(candidates, key=lambda c: size(c.blocks), default=None)
    sides = side_paths(model)
    if sides:
        root = sides.get(side or "encoder")
        candidates = [c for c in candidates if root is not None and _below(c.path, root)]
    elif side is not None:
        root = ""
        candidates = [c for c in candidates if side in c.path.split(".")]
    else:
        root = _language_root(model, candidates)
        candidates = [c for c in candidates if _below(c.path, root)]
    inner = {c.path: c.path[len(root or "") :] for c in candidates}
    text = [
        c
        for c in candidates
        if not of_modality(inner[c.path]) and not _LOW_LEVEL.search(inner[c.path])
    ]

    def rank(block_list: BlockList) -> tuple[bool, int]:
        count = read(text_config(config_of(model, block_list.path)), _COUNTS)
        return len(block_list.blocks) == count, size(block_list.blocks)

    return max(text or candidates, key=rank, default=None)


def towers_of(path: str) -> set[str]:
    """The names of :data:`TOWERS` that occur in a module path."""
    return {name for name, pattern in TOWERS.items() if pattern.search(path)}


def projector_paths(model: nn.Module, tower: str | None = None) -> list[str]:
    """Paths of the modules that bring a tower's rows to the language model's width.

    Args:
        model: the model.
        tower: a name of :data:`TOWERS`; None: of any.
    """
    lists, language = block_lists(model), find_blocks(model)
    beside = {name: find_blocks(model, name) for name in TOWERS if tower in (None, name)}
    if language is None or not any(
        b is not None and b.path != language.path for b in beside.values()
    ):
        return []
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(_below(path, outer) for outer in (*found, *(b.path for b in lists)))
        if size(module) and not inside and _PROJECTOR.match(path.rsplit(".", 1)[-1]):
            found.append(path)
    if tower is None:
        return found
    return [path for path in found if tower in towers_of(path)] or [
        path for path in found if not towers_of(path)
    ]


def takes(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether a module's ``forward`` has a parameter of one of these names."""
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in names)


def backbone_path(model: nn.Module, path: str) -> str:
    """Path of the module whose call receives the inputs of the module at ``path``.

    The innermost ancestor that contains blocks and whose ``forward`` has a parameter for model
    inputs (``input_ids``, ``pixel_values``, ...); if there is none, the innermost ancestor with
    ``inputs_embeds``; else "", the model itself. Embedding layers also take ``input_ids`` but
    contain no blocks. ``inputs_embeds`` has lower priority because encoders inside a tower take it
    together with a mask of another shape.
    """
    parts = path.split(".")
    ancestors = [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    modules = [(a, model.get_submodule(a)) for a in ancestors]
    modules = [(a, m) for a, m in modules if not isinstance(m, containers)]
    for names in (_TRUE_INPUTS, ("inputs_embeds",)):
        for ancestor, module in modules:
            if takes(module, names) and any(isinstance(m, nn.ModuleList) for m in module.modules()):
                return ancestor
    return ""


def stream_of(model: nn.Module, path: str, backbone: str, block_list: BlockList | None) -> str:
    """The ``stream`` of a :class:`~reft_kernels.model.components.Target`.

    Args:
        model: the model.
        path: path of the module.
        backbone: path of its backbone.
        block_list: the list of blocks that contains the module; None outside the blocks.

    Returns:
        "tokens" if the module has one row per token of the backbone's call, else "own".
    """
    caller = model.get_submodule(backbone)
    if not takes(caller, MODEL_INPUTS):
        return "tokens"  # a custom model with unknown argument names
    if not takes(caller, TOKEN_INPUTS):
        return "own"
    inner = path[len(backbone) :].lstrip(".")
    if block_list is not None:
        return "own" if of_modality(block_list.path[len(backbone) :]) else "tokens"
    if of_modality(inner):
        return "own"
    if not takes(caller, MODALITY_INPUTS):
        return "tokens"
    module = model.get_submodule(path)
    head = getattr(model, "get_output_embeddings", None)
    if isinstance(module, nn.Embedding) or (callable(head) and head() is module):
        return "tokens"
    return "tokens" if "norm" in type(module).__name__.lower() else "own"
