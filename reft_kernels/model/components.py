"""Finding what to edit: the blocks of a model by their structure, components within them, and the width of each.

A component is a role or a module path:

    "block_output", "block_input"                 the residual stream after or before each block
    "attention_output", "attention_input"         of the first module of a block whose class is named ...Attention
    "mlp_output", "mlp_input", "mlp_activation"   of the block's feed-forward module; the activation is what its last
                                                  projection reads
    "decoder.block_output", "encoder.mlp_output"  a role within one side of an encoder-decoder model; a bare role means the
                                                  encoder, which is where the prompt is
    "model.layers.{layer}.self_attn.o_proj"       a module path (``[{layer}]`` too): its output, or its input with ".input"
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

ROLES = (
    "block_output",
    "block_input",
    "attention_output",
    "attention_input",
    "mlp_output",
    "mlp_input",
    "mlp_activation",
)
TOKEN_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
MODEL_INPUTS = (*TOKEN_INPUTS, "pixel_values", "input_values", "input_features")

_MLP_NAMES = ("mlp", "feed_forward", "ffn", "feedforward")
_WIDTH_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_SHOWN = 24


class Target(NamedTuple):
    """One place to edit: a module's input or output.

    ``inplace`` says that the tensor is certainly fresh and seen by the next layer alone; ``present`` that the module is in this
    process (pipeline parallel replaces the others by empty ones).
    """

    layer: int
    path: str
    side: str
    embed_dim: int
    inplace: bool
    present: bool = True
    stream: str = "tokens"
    layout: str = "btd"


class Component(NamedTuple):
    """The targets of one component, and the backbone whose call brings the tokens that they belong to."""

    targets: tuple[Target, ...]
    backbone: str
    encoder: bool  # the encoder, or
    decoder: bool  # the decoder, of an encoder-decoder model


class BlockList(NamedTuple):
    """A list of blocks: its module path and its modules."""

    path: str
    blocks: nn.ModuleList


def _text_config(model: nn.Module):
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def _read(config, names: Iterable[str]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def block_lists(model: nn.Module) -> list[BlockList]:
    """Every list of blocks, outermost only (a list of experts inside a block is no list of blocks)."""
    found: list[BlockList] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer.path}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and _size(module):
            found.append(BlockList(path, module))
    return found


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def find_blocks(model: nn.Module, side: str | None = None) -> BlockList | None:
    """The model's blocks: the largest list with ``num_hidden_layers`` entries, else the largest list.

    Args:
        side: "encoder" or "decoder" of an encoder-decoder model; None: the encoder of such a model, or the only stack.
    """
    candidates = block_lists(model)
    if side is None and _is_encoder_decoder(model):
        side = "encoder"
    if side is not None:
        candidates = [c for c in candidates if side in c.path.split(".")]
    count = _read(_text_config(model), ("num_hidden_layers", "n_layer", "num_layers"))
    return max(candidates, key=lambda c: (len(c.blocks) == count, _size(c.blocks)), default=None)


def _takes(module: nn.Module, names: Iterable[str]) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in names)


def backbone_path(model: nn.Module, path: str) -> str:
    """The innermost ancestor of ``path`` whose ``forward`` takes a model's inputs (tokens, embeddings, pixels)."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        ancestor = ".".join(parts[:depth])
        module = model.get_submodule(ancestor)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) and _takes(module, MODEL_INPUTS):
            return ancestor
    return ""


# ---- widths


def _own_width(module: nn.Module, side: str) -> int | None:
    """Width of a module's input or output, from its own weight; None where the weight does not tell."""
    features = getattr(module, "in_features" if side == "input" else "out_features", None)
    if isinstance(features, int):
        return features
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    if isinstance(getattr(module, "nf", None), int) and weight.dim() == 2:  # transformers' Conv1D: [in, out]
        return weight.shape[0 if side == "input" else 1]
    return weight.shape[0] if weight.dim() == 1 else None


def _stream_width(model: nn.Module, block: nn.Module) -> int | None:
    """Width of the residual stream: from the configuration, else from the block's first norm or linear layer."""
    width = _read(_text_config(model), _WIDTH_NAMES) or _read(getattr(model, "config", None), _WIDTH_NAMES)
    if width is not None:
        return width
    return next((w for w in (_own_width(m, "input") for m in block.modules()) if w is not None), None)


def _width(model: nn.Module, module: nn.Module, block: nn.Module, side: str, stated: int | None, path: str) -> int:
    if stated is not None:
        return stated
    width = (None if module is block else _own_width(module, side)) or _stream_width(model, block)
    if width is None:
        raise ValueError(
            f"embed_dim: cannot tell the width of the {side} of {path!r} ({type(module).__name__}); "
            "state it: ReftConfig(embed_dim=...)"
        )
    return width


# ---- roles


def _find_in(block: nn.Module, wanted) -> str | None:
    return next((name for name, module in block.named_modules() if name and wanted(name, module)), None)


def _is_mlp(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return name.rsplit(".", 1)[-1].lower() in _MLP_NAMES or kind.endswith(("MLP", "FeedForward", "LayerFF"))


def _last_projection(module: nn.Module, prefix: str) -> str | None:
    names = [name for name, m in module.named_modules() if _own_width(m, "input") and m.weight.dim() == 2]
    return f"{prefix}.{names[-1]}".strip(".") if names else None


def _role_path(block: nn.Module, role: str) -> tuple[str, str] | None:
    """Path within the block and side, for a role; None where the block has no such part."""
    part, side = role.rsplit("_", 1)
    if part == "block":
        return "", side
    if part == "attention":
        path = _find_in(block, lambda name, module: type(module).__name__.endswith("Attention"))
        return None if path is None else (path, side)
    path = _find_in(block, _is_mlp)
    if path is not None:
        if side != "activation":
            return path, side
        projection = _last_projection(block.get_submodule(path), path)
        return None if projection is None else (projection, "input")
    children = dict(block.named_children())
    if "intermediate" in children and hasattr(children.get("output"), "dense"):  # BERT spells its MLP as two siblings
        return {
            "input": ("intermediate", "input"),
            "activation": ("output.dense", "input"),
            "output": ("output.dense", "output"),
        }[side]
    return None


def _by_role(model: nn.Module, role: str, side: str | None, embed_dim: int | None) -> tuple[list[Target], BlockList]:
    found = find_blocks(model, side)
    if found is None:
        where = "" if side is None else f" in the {side}"
        raise ValueError(
            f"component: got {role!r}, but {type(model).__name__} has no list of blocks{where}; name modules by path, such as "
            "'model.layers.{layer}.mlp'"
        )
    targets = []
    for layer, block in enumerate(found.blocks):
        path = f"{found.path}.{layer}"
        if not _size(block):  # another pipeline stage owns it
            width = embed_dim or _stream_width(model, found.blocks)
            targets.append(Target(layer, path, "output", width, False, present=False))
            continue
        place = _role_path(block, role)
        if place is None:
            roles = ", ".join(r for r in ROLES if _role_path(block, r) is not None)
            raise ValueError(
                f"component: got {role!r}, but {type(block).__name__} ({path!r}) has no such part; it has {roles}, or name a "
                f"module by path: {_candidates(model, found)}"
            )
        inner, where = place
        module = block.get_submodule(inner) if inner else block
        width = _width(model, module, block, where, embed_dim, path)
        targets.append(Target(layer, f"{path}.{inner}".rstrip("."), where, width, role == "block_output"))
    return targets, found


# ---- paths


def _candidates(model: nn.Module, found: BlockList | None, wanted: str = "") -> str:
    if found is None:
        names = [name for name, _ in model.named_modules() if name]
    else:
        block = next((b for b in found.blocks if _size(b)), None)
        names = [f"{found.path}.{{layer}}"]
        names += [f"{found.path}.{{layer}}.{name}" for name, _ in block.named_modules() if name]
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) if wanted else []
    ordered = close + [name for name in names if name not in close]
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


def _matches(model: nn.Module, pattern: str) -> dict[str, int]:
    """Module path -> layer number for every module whose path is the pattern, or ends with it."""
    expression = re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)")
    exact, ending = re.compile(expression), re.compile(rf"(?:.*\.)?{expression}")
    # a container is never called itself
    names = [name for name, m in model.named_modules() if name and not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    for form in (exact, ending):
        hits = {name: form.fullmatch(name) for name in names}
        hits = {name: hit for name, hit in hits.items() if hit is not None}
        if hits:
            return {name: int(hit[1]) if hit.groups() else 0 for name, hit in hits.items()}
    return {}


def _by_path(model: nn.Module, component: str, embed_dim: int | None) -> tuple[list[Target], BlockList | None]:
    pattern, side = component.replace("[", ".").replace("]", ""), "output"
    if pattern.count("{layer}") > 1:
        raise ValueError(f"component: got {component!r}, expected {{layer}} at most once")
    hits = _matches(model, pattern)
    if not hits and pattern.endswith((".input", ".output")):
        pattern, side = pattern.rsplit(".", 1)
        hits = _matches(model, pattern)
    if not hits:
        found = find_blocks(model)
        raise ValueError(
            f"component: got {component!r}, which names no module of {type(model).__name__}; expected one of "
            f"{', '.join(ROLES)}, or a module path such as {_candidates(model, found, pattern)}"
        )
    if len(set(hits.values())) < len(hits):
        raise ValueError(f"component: got {component!r}, which is ambiguous: {', '.join(sorted(hits)[:_SHOWN])}")
    lists = block_lists(model)
    first = next(iter(hits))
    inside = next((b for b in lists if first.startswith(f"{b.path}.")), None)
    targets = []
    for path, layer in sorted(hits.items(), key=lambda item: item[1]):
        module = model.get_submodule(path)
        is_block = inside is not None and path == f"{inside.path}.{layer}"
        block = module if inside is None else inside.blocks[int(path[len(inside.path) + 1 :].split(".")[0])]
        width = _width(model, module, block, side, embed_dim, path)
        targets.append(Target(layer, path, side, width, is_block and side == "output"))
    return targets, inside


# ---- the whole


def _check_layers(layers: str | list[int], available: list[int]) -> list[int]:
    if layers == "all":
        return available
    missing = [n for n in layers if n not in available]
    if missing:
        low, high = min(available), max(available)
        raise ValueError(f"layers: got {list(layers)}, expected layer numbers from {low} to {high}; {missing} are out of range")
    return list(layers)


def resolve(model: nn.Module, component: str, layers: str | list[int] = "all", *, embed_dim: int | None = None) -> Component:
    """The targets of ``component`` in the given layers of ``model``; the model is not touched.

    Args:
        component: a role or a module path; see the module's text.
        layers: "all" or layer numbers, in the order in which the weights are stacked.
        embed_dim: width of the targets, where neither the configuration nor the weights tell it.

    Raises:
        ValueError: a component that matches nothing (with what would match), layers out of range, an unknown width.
    """
    side, role = None, component
    head, _, rest = component.partition(".")
    if head in ("encoder", "decoder") and rest in ROLES:
        side, role = head, rest
    if role in ROLES:
        targets, found = _by_role(model, role, side, embed_dim)
    else:
        targets, found = _by_path(model, component, embed_dim)
    by_layer = {target.layer: target for target in targets}
    chosen = tuple(by_layer[n] for n in _check_layers(layers, sorted(by_layer)))
    backbone = backbone_path(model, chosen[0].path)
    sides = found.path.split(".") if found is not None and _is_encoder_decoder(model) else ()
    return Component(chosen, backbone, "encoder" in sides, "decoder" in sides)
