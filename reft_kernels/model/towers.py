"""The towers of a model: its lists of blocks, the language model among them, the sides, and the
module called with inputs.
"""

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
_MODALITY = re.compile(
    r"vision|visual|image|audio|speech|video|pixel|q_?former|perceiver|resampler|connector|projector|merger|"
    r"abstractor|tower",
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
    """Whether a module path leads through a tower of images or sounds, or what joins one to the
    language model.
    """
    return any(_MODALITY.search(part) for part in path.split("."))


def block_lists(model: nn.Module) -> list[BlockList]:
    """Every list of blocks, outermost only (a list of experts inside a block is no list of
    blocks).
    """
    found: list[BlockList] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer.path}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and size(module):
            found.append(BlockList(path, module))
    return found


def _below(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(f"{root}.")


def _language_root(model: nn.Module, lists: list[BlockList]) -> str:
    """Path of the language model in a model of several towers; "" if it is the model itself."""
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
    """Module paths of "encoder" and "decoder" of an encoder-decoder model, or of its language
    model; empty if it is none.
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
        held = names.get(id(getter())) if callable(getter) else None
        if held:
            sides[side] = held
    return sides


def find_blocks(model: nn.Module, side: str | None = None) -> BlockList | None:
    """The blocks of a model's language model, or of its only tower.

    Among several lists: the largest with as many entries as the configuration of its own tower
    says, else the largest.

    Args:
        side: "encoder" or "decoder" of an encoder-decoder model; None: the encoder of such a model,
            or the only stack.
    """
    candidates = block_lists(model)
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

    def rank(found: BlockList) -> tuple[bool, int]:
        count = read(text_config(config_of(model, found.path)), _COUNTS)
        return len(found.blocks) == count, size(found.blocks)

    return max(text or candidates, key=rank, default=None)


def takes(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether a module's ``forward`` has a parameter of one of these names."""
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in names)


def backbone_path(model: nn.Module, path: str) -> str:
    """The module whose call brings what the place at ``path`` works on.

    The innermost ancestor that holds blocks and whose ``forward`` takes a model's input
    (``input_ids``, ``pixel_values``, ...); if there is none, the innermost that takes
    ``inputs_embeds``; "" is the model itself. Embedding layers take ``input_ids`` too, but hold no
    blocks, and encoders within a tower take ``inputs_embeds`` and a mask of another shape.
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
    """ "tokens" where a place has one row for each token of the backbone's call, "own" where it
    has rows of its own.
    """
    caller = model.get_submodule(backbone)
    if not takes(caller, MODEL_INPUTS):
        return "tokens"  # a model of no family: its only rows are the hidden state's
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
