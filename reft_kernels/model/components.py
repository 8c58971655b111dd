"""Finding what to edit: the blocks of a model by their structure, components within them, and the width of each.

A component is a role or a module path:

    "block_output", "block_input"                 the residual stream after or before each block
    "attention_output", "attention_input"         of the block's self-attention
    "mixer_output", "mixer_input"                 of the token mixer that is no attention: state space, linear attention, ...
    "mlp_output", "mlp_input", "mlp_activation"   of the block's feed-forward; the activation is what its last projection reads
    "decoder.block_output", "encoder.mlp_output"  a role within one side of an encoder-decoder model; a bare role means the
                                                  encoder, which is where the prompt is
    "model.layers.{layer}.self_attn.o_proj"       a module path (``[{layer}]`` too): its output, or its input with ".input"

:mod:`reft_kernels.model.roles` says what a role means for a mixture of experts or a hybrid. In a model of several towers a role
means the language model's blocks, and a path reaches the others, whose rows are counted by their own shape. A module that runs
several times in a forward, such as a layer shared by blocks, is edited each time.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from reft_kernels.model import families
from reft_kernels.model.roles import Absent, find_role, is_mixture
from reft_kernels.model.widths import own_width, part_width, read_integer, stream_width

ROLES = (
    "block_output",
    "block_input",
    "attention_output",
    "attention_input",
    "mixer_output",
    "mixer_input",
    "mlp_output",
    "mlp_input",
    "mlp_activation",
)
MODEL_INPUTS = (
    "input_ids",
    "decoder_input_ids",
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "input_features",
    "bbox",
)
EMBEDDED_INPUTS = ("inputs_embeds", "decoder_inputs_embeds")
_LANGUAGE_MODELS = ("language_model", "text_model", "llm", "text_decoder")
_SHOWN = 24


class Target(NamedTuple):
    """One place to edit: a module's input or output.

    ``inplace`` says that the tensor is certainly fresh and seen by the next layer alone; ``present`` that the module is in this
    process (pipeline parallel replaces the others). ``stream`` is "tokens" where the hidden state has a row for each
    token of the backbone's call, "own" where it has rows of its own (a vision or audio tower, a projector); ``layout`` is that
    of the hidden state, as :func:`reft_kernels.model.selection.place_rows` names it.
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


def _text_config(module: nn.Module):
    config = getattr(module, "config", None)
    getter = getattr(config, "get_text_config", None)
    return getter() if callable(getter) else config


def language_model_path(model: nn.Module) -> str:
    """Path of the language model in a model of several towers; "" where the model has no such part."""
    for depth in (1, 2, 3):
        for path, module in model.named_modules():
            parts = path.split(".")
            if len(parts) == depth and parts[-1] in _LANGUAGE_MODELS and _size(module) and block_lists(module):
                return path
    return ""


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a module's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def side_of(path: str) -> str | None:
    """ "encoder" or "decoder": the first that a path names. A BERT decoder's blocks stand in "decoder.bert.encoder.layer"."""
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), None)


def find_blocks(model: nn.Module, side: str | None = None) -> BlockList | None:
    """The blocks of a model's language model: the largest list with ``num_hidden_layers`` entries, else the largest list.

    Args:
        side: "encoder" or "decoder" of an encoder-decoder model; None: the encoder of such a model, or the only stack.
    """
    start = language_model_path(model)
    core = model.get_submodule(start) if start else model
    split = is_encoder_decoder(core)
    candidates = [BlockList(f"{start}.{b.path}".strip("."), b.blocks) for b in block_lists(core)]
    if side is None and split:
        side = "encoder"
    if side is not None:
        # an encoder-decoder's sides are named in full; in other models the word may stand anywhere
        own = [c for c in candidates if (side_of(c.path) == side if split else side in c.path.split("."))]
        candidates = own
    count = read_integer(_text_config(core), ("num_hidden_layers", "n_layer", "n_layers", "num_layers"))
    return max(candidates, key=lambda c: (len(c.blocks) == count, _size(c.blocks)), default=None)


def _takes(module: nn.Module, names: Iterable[str]) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return any(name in parameters for name in names)


def backbone_path(model: nn.Module, path: str) -> str:
    """The innermost ancestor of ``path`` whose ``forward`` takes a model's inputs (tokens, pixels, audio), else embeddings.

    Tokens first: a module inside that takes embeddings may get a mask in another form than the user's. Modules inside a block
    are no backbones, though some take the tokens too.
    """
    inside = next((b.path for b in block_lists(model) if path.startswith(f"{b.path}.")), None)
    parts = (path if inside is None else inside).split(".")
    ancestors = [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
    for names in (MODEL_INPUTS, EMBEDDED_INPUTS):
        for ancestor in ancestors:
            module = model.get_submodule(ancestor) if ancestor else model
            if not isinstance(module, nn.ModuleList | nn.ModuleDict) and _takes(module, names):
                return ancestor
    return ""


def _width(model: nn.Module, module: nn.Module, block: nn.Module, side: str, stated: int | None, path: str) -> int:
    if stated is not None:
        return stated
    width = None if module is block else own_width(module, side)
    if width is None:
        width = stream_width(model, path, block, side)
        if module is not block and not is_mixture(module):
            width = part_width(module, side, width)
    if width is None:
        raise ValueError(
            f"embed_dim: cannot tell the width of the {side} of {path!r} ({type(module).__name__}); "
            "state it: ReftConfig(embed_dim=...)"
        )
    return width


def _model_type(model: nn.Module, path: str) -> str | None:
    configs = families.own_config(model, path)
    return getattr(configs[0], "model_type", None) if configs else None


def _target(
    model: nn.Module, layer: int, path: str, side: str, block: nn.Module, is_block: bool, embed_dim: int | None
) -> Target:
    module = model.get_submodule(path)
    width = _width(model, module, block, side, embed_dim, path)
    layout = families.layout_of(_model_type(model, path), is_block)
    return Target(layer, path, side, width, is_block and side == "output", True, families.stream_of(path), layout)


# ---- roles


def _by_role(
    model: nn.Module, role: str, side: str | None, layers: str | list[int], embed_dim: int | None
) -> tuple[list[Target], BlockList]:
    name = type(model).__name__
    for kind in families.model_types(model):
        if kind in families.WITHOUT_BLOCKS:
            raise ValueError(f"component: got {role!r}, but {name} ({kind}) has no such part: {families.WITHOUT_BLOCKS[kind]}")
    found = find_blocks(model, side)
    if found is not None:
        families.check_role(_model_type(model, f"{found.path}.0"), role)
    if found is None:
        where = "" if side is None else f" in the {side}"
        raise ValueError(
            f"component: got {role!r}, but {name} has no list of blocks{where}; name modules by path, such as "
            "'model.layers.{layer}.mlp'"
        )
    present = {layer: block for layer, block in enumerate(found.blocks) if _size(block)}  # pipeline parallel: not elsewhere
    places = {layer: find_role(block, role) for layer, block in present.items()}
    chosen = _check_layers(layers, list(range(len(found.blocks))))
    absent = {layer: places[layer] for layer in chosen if isinstance(places.get(layer), Absent)}
    if absent:
        _refuse_absent(model, role, found, places, absent)
    targets = []
    for layer in chosen:
        path = f"{found.path}.{layer}"
        if layer not in present:
            width = embed_dim or stream_width(model, path, found.blocks)
            targets.append(Target(layer, path, "output", width, False, present=False))
            continue
        if families.holds_images(present[layer], _model_type(model, path)):
            raise ValueError(
                f"component: got {role!r}, but the blocks of {name} ({path!r}) hold images [B, C, H, W], expected sequences "
                "[B, T, d]; this architecture is not supported"
            )
        inner, where = places[layer]
        is_block = role in ("block_output", "block_input")
        place = f"{path}.{inner}".rstrip(".")
        targets.append(_target(model, layer, place, where, present[layer], is_block, embed_dim))
    return targets, found


def _refuse_absent(model: nn.Module, role: str, found: BlockList, places: dict, absent: dict) -> None:
    layer, why = next(iter(absent.items()))
    block = found.blocks[layer]
    having = [n for n, place in places.items() if not isinstance(place, Absent)]
    if having:
        raise ValueError(
            f"layers: {role!r} is no part of layers {sorted(absent)} (layer {layer}, {type(block).__name__}: {why.reason}), "
            f"expected layers among {having}: ReftConfig(layers=[...])"
        )
    roles = ", ".join(r for r in ROLES if not isinstance(find_role(block, r), Absent))
    raise ValueError(
        f"component: got {role!r}, but {type(block).__name__} ({found.path}.{layer}) has no such part: {why.reason}; "
        f"it has {roles}, or name a module by path: {_candidates(model, found)}"
    )


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
    for path in hits:
        families.check_path(path)
    lists = block_lists(model)
    first = next(iter(hits))
    inside = next((b for b in lists if first.startswith(f"{b.path}.")), None)
    targets = []
    for path, layer in sorted(hits.items(), key=lambda item: item[1]):
        module = model.get_submodule(path)
        is_block = inside is not None and path == f"{inside.path}.{layer}"
        block = module if inside is None else inside.blocks[int(path[len(inside.path) + 1 :].split(".")[0])]
        targets.append(_target(model, layer, path, side, block, is_block, embed_dim))
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
    for kind in families.model_types(model):
        if kind in families.REFUSED:
            raise ValueError(f"component: {type(model).__name__} ({kind}) is not supported: {families.REFUSED[kind]}")
    side, role = None, component
    head, _, rest = component.partition(".")
    if head in ("encoder", "decoder") and rest in ROLES:
        side, role = head, rest
    if role in ROLES:
        targets, found = _by_role(model, role, side, layers, embed_dim)
    else:
        targets, found = _by_path(model, component, embed_dim)
    by_layer = {target.layer: target for target in targets}
    chosen = tuple(by_layer[n] for n in _check_layers(layers, sorted(by_layer)))
    backbone = backbone_path(model, chosen[0].path)
    start = language_model_path(model)
    core = model.get_submodule(start) if start and chosen[0].path.startswith(f"{start}.") else model
    split = side_of(chosen[0].path) if is_encoder_decoder(core) else None
    return Component(chosen, backbone, split == "encoder", split == "decoder")
