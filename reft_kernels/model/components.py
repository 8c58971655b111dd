"""Resolves a component, such as "block_output", to the modules of a model.

A component is a role or a module path:

    "block_output", "block_input"
        The residual stream after or before each block.
    "attention_output", "attention_input"
        The block's self-attention. Linear attention counts as a mixer; cross-attention must be
        named by path.
    "mixer_output", "mixer_input"
        The block's token mixer other than attention: state space, linear attention, convolution,
        recurrence, Fourier transform.
    "mlp_output", "mlp_input"
        The block's whole feed-forward. For a mixture of experts this includes router, routed
        experts and shared expert: the sum that is added to the residual stream.
    "mlp_activation"
        The input of the last projection of a dense feed-forward. Not defined for a mixture of
        experts.
    "decoder.block_output", "encoder.mlp_output"
        A role in one side of an encoder-decoder model. A role without a side means the encoder,
        which holds the prompt.
    "vision.block_output", "audio.mlp_output"
        A role in the tower of images, or of audio, of a model with several towers.
    "projector", "vision.projector", "audio.projector"
        The output of the module that brings a tower's rows to the language model's width: layer 0.
    "model.layers.{layer}.self_attn.o_proj"
        A module path (``[{layer}]`` works too): the module's output, or its input with ".input".

A role is the output of the module that computes the part. In some families this output includes
the residual stream (T5's layers, Bloom's feed-forward, the attention of BERT). Blocks without the
part, as in hybrid models, raise only if ``layers`` includes them. A role is rejected if the block
has several such parts, if no single module computes the part, or if
:mod:`reft_kernels.model.families` excludes the architecture. In a model with several towers, roles
refer to the language model, unless they name a tower. The rows of a tower or a projector are its
own: all of them are a prompt.

A module that runs several times in a forward (ALBERT's groups) is edited each time with the same
weights. A module shared by several layers is rejected, because it cannot have weights for each
layer. Experts, and the keys and values of cross-attention, are rejected because they do not have
one row per token.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from reft_kernels.model.families import (
    FAMILIES_WITHOUT_ROLES,
    config_of,
    layout_of,
    model_type_of,
    unsupported_family_reason,
    unsupported_target_reason,
)
from reft_kernels.model.roles import ROLES, Place, find_role, holds_maps, unsuitable_reason
from reft_kernels.model.towers import (
    MODEL_INPUTS,
    TOKEN_INPUTS,
    TOWERS,
    BlockList,
    backbone_path,
    block_lists,
    find_blocks,
    projector_paths,
    side_paths,
    size,
    stream_of,
)
from reft_kernels.model.widths import between_blocks, place_width, stream_width

__all__ = [
    "MODEL_INPUTS",
    "ROLES",
    "TOKEN_INPUTS",
    "BlockList",
    "Component",
    "Target",
    "backbone_path",
    "block_lists",
    "find_blocks",
    "resolve",
]

_SHOWN = 24


class Target(NamedTuple):
    """The input or output of one module.

    Attributes:
        layer: layer number.
        path: module path in the model.
        side: "input" or "output".
        embed_dim: d, the last dimension of the hidden state.
        inplace: whether the tensor may be edited in place: newly allocated, and read by the next
            layer only.
        present: whether the module is in this process. Pipeline parallelism replaces the other
            modules by empty ones.
        stream: "tokens" if the hidden state has one row per token of the backbone's call; "own" if
            its rows are counted from its own shape (an image or audio tower, a projector, a
            resampler, image rows beside the tokens).
        layout: memory layout of the hidden state. "btd": ``[B, T, d]`` or ``[B * T, d]``.
            "tbd": ``[T, B, d]``. "btsd": ``[B, T, streams, d]``. "sbtd": ``[streams, B, T, d]``.
            "btd_padded": ``[B, T + padding, d]``, padded on the right by the model to a multiple
            of a window or block.
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
    """The targets of one component.

    Attributes:
        targets: one target per layer, in the order in which the weights are stacked.
        backbone: path of the module whose call receives the tokens of the targets.
        encoder: whether the backbone is the encoder of an encoder-decoder model.
        decoder: whether the backbone is the decoder of an encoder-decoder model.
    """

    targets: tuple[Target, ...]
    backbone: str
    encoder: bool
    decoder: bool


class _Places(NamedTuple):
    """The module of each layer that a component names, or the reason why there is none.

    Attributes:
        found: layer -> (module path, "input" or "output").
        missing: layer -> block without the component, and the reason, as text.
        absent: layer -> path of a block that another pipeline stage owns.
    """

    found: dict[int, tuple[str, str]]
    missing: dict[int, str]
    absent: dict[int, str]


def _containing_block(lists: Sequence[BlockList], path: str) -> tuple[BlockList, str] | None:
    """The block list that contains a path, and the path of the block; None outside of blocks."""
    for block_list in lists:
        if path.startswith(f"{block_list.path}."):
            number = path[len(block_list.path) + 1 :].split(".")[0]
            return block_list, f"{block_list.path}.{number}"
    return None


def _side_of(sides: dict[str, str], path: str) -> str | None:
    return next(
        (s for s, root in sides.items() if path == root or path.startswith(f"{root}.")), None
    )


def _candidates(model: nn.Module, block_list: BlockList | None, pattern: str = "") -> str:
    """Module paths for an error message, those similar to ``pattern`` first."""
    if block_list is None:
        names = [name for name, _ in model.named_modules() if name]
    else:
        path, blocks = block_list
        names = [f"{path}.{{layer}}"]
        block = next((b for b in blocks if size(b)), None)
        if block is not None:
            names += [f"{path}.{{layer}}.{name}" for name, _ in block.named_modules() if name]
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) if pattern else []
    ordered = close + [name for name in names if name not in close]
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


# ---- roles


def _by_role(model: nn.Module, role: str, side: str | None) -> _Places:
    block_list = find_blocks(model, side)
    kind = model_type_of(model, "" if block_list is None else block_list.path)
    reason = unsupported_family_reason(kind)
    if reason is not None:
        raise ValueError(
            f"component: got {role!r}, which cannot be edited in {type(model).__name__} ({kind}): "
            f"{reason}"
        )
    if kind in FAMILIES_WITHOUT_ROLES:
        raise ValueError(
            f"component: got {role!r}, but {type(model).__name__} ({kind}) has no such module: "
            f"{FAMILIES_WITHOUT_ROLES[kind]}"
        )
    if block_list is None:
        where = "" if side is None else f" in {'its tower of' if side in TOWERS else 'the'} {side}"
        raise ValueError(
            f"component: got {role!r}, but {type(model).__name__} has no list of blocks{where}; "
            "name modules by path, such as 'model.layers.{layer}.mlp'"
        )
    places = _Places({}, {}, {})
    for layer, block in enumerate(block_list.blocks):
        path = f"{block_list.path}.{layer}"
        if not size(block):
            places.absent[layer] = path
            continue
        place = _role_in(model, path, block, role)
        if isinstance(place, str):
            places.missing[layer] = f"{type(block).__name__} ({path}) {place}"
        else:
            places.found[layer] = (f"{path}.{place.path}".rstrip("."), place.side)
    if not places.found and places.missing:
        number, block = next((n, b) for n, b in enumerate(block_list.blocks) if size(b))
        path = f"{block_list.path}.{number}"
        roles = ", ".join(r for r in ROLES if not isinstance(_role_in(model, path, block, r), str))
        first = next(iter(places.missing.values()))
        listed = f"it has {roles}, or name" if roles else "name"
        raise ValueError(
            f"component: got {role!r}, but {first}; {listed} a module by path: "
            f"{_candidates(model, block_list)}"
        )
    return places


def _role_in(model: nn.Module, path: str, block: nn.Module, role: str) -> Place | str:
    """The place of a role in a block, or the reason why there is none, as text."""
    if isinstance(block, nn.ModuleList | nn.ModuleDict):
        return "is a list in a list, which is never called itself"
    if holds_maps(block):
        return "is convolutional: it holds channels first, [B, C, ...], not rows of tokens"
    if role.startswith("block"):
        return Place("", role.rsplit("_", 1)[1])
    if isinstance(getattr(block, "blocks", None), nn.ModuleList):
        return (
            "is a stage of several blocks: block_output and block_input are the stage's; name a "
            "block's part by path"
        )
    place = find_role(block, role, stream_width(model, path, block, "input"))
    chunk = getattr(config_of(model, path), "chunk_size_feed_forward", 0)
    if (
        role.startswith("mlp")
        and not isinstance(place, str)
        and isinstance(chunk, int)
        and chunk > 0
    ):
        return (
            "runs its feed-forward on chunks of the sequence; set config.chunk_size_feed_forward "
            "= 0"
        )
    return place


def _projector(model: nn.Module, component: str, tower: str | None) -> _Places:
    paths = projector_paths(model, tower)
    if len(paths) != 1:
        found = f"several: {', '.join(paths)}" if paths else "none by its modules' names"
        raise ValueError(
            f"component: got {component!r}, but {type(model).__name__} has {found}; name the "
            "module by path"
        )
    return _Places({0: (paths[0], "output")}, {}, {})


# ---- paths


def _matches(model: nn.Module, pattern: str) -> dict[str, re.Match]:
    """Modules whose path equals the pattern; if there are none, those whose path ends with it."""
    expression = re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)")
    exact, ending = re.compile(expression), re.compile(rf"(?:.*\.)?{expression}")
    # containers are never called, so their hooks would not run
    names = [
        name
        for name, m in model.named_modules()
        if name and not isinstance(m, nn.ModuleList | nn.ModuleDict)
    ]
    for form in (exact, ending):
        hits = {name: hit for name in names if (hit := form.fullmatch(name)) is not None}
        if hits:
            return hits
    return {}


def _by_path(model: nn.Module, component: str) -> _Places:
    pattern, side = component.replace("[", ".").replace("]", ""), "output"
    if pattern.count("{layer}") > 1:
        raise ValueError(f"component: got {component!r}, expected {{layer}} at most once")
    hits = _matches(model, pattern)
    if not hits and pattern.endswith((".input", ".output")):
        pattern, side = pattern.rsplit(".", 1)
        hits = _matches(model, pattern)
    if not hits:
        raise ValueError(
            f"component: got {component!r}, which names no module of {type(model).__name__}; "
            f"expected one of {', '.join(ROLES)}, or a module path such as "
            f"{_candidates(model, find_blocks(model), pattern)}"
        )
    numbers = {path: int(hit[1]) if hit.groups() else 0 for path, hit in hits.items()}
    if len(set(numbers.values())) < len(numbers):
        raise ValueError(
            f"component: got {component!r}, which is ambiguous: {', '.join(sorted(hits)[:_SHOWN])}"
        )
    places = _Places({layer: (path, side) for path, layer in numbers.items()}, {}, {})
    path, hit = next(iter(hits.items()))
    if hit.groups():
        parent = path[: hit.start(1)].rstrip(".")
        for name, block in model.get_submodule(parent).named_children() if parent else ():
            layer = int(name) if name.isdigit() else -1
            if layer < 0 or layer in places.found:
                continue
            if isinstance(model.get_submodule(parent), nn.ModuleList) and not size(block):
                places.absent[layer] = f"{parent}.{name}"
            else:
                places.missing[layer] = (
                    f"{type(block).__name__} ({parent}.{name}) has no such module"
                )
    return places


# ---- components


def _choose(component: str, layers: str | list[int], places: _Places) -> list[int]:
    """Layer numbers to edit, in order; raises ValueError for layers without the component."""
    available = sorted({*places.found, *places.missing, *places.absent})
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: got {layers!r}, expected 'all' or a list of layer numbers")
        chosen = available
    else:
        chosen = list(layers)
    beyond = [n for n in chosen if n not in available]
    if beyond:
        low, high = available[0], available[-1]
        raise ValueError(
            f"layers: got {list(layers)}, expected layer numbers from {low} to {high}; {beyond} "
            "are out of range"
        )
    without = [n for n in chosen if n in places.missing]
    if without:
        got = repr(layers) if layers == "all" else list(layers)
        having = sorted(places.found)
        raise ValueError(
            f"layers: got {got}, but {component!r} is not in layers {without}: "
            f"{places.missing[without[0]]}; "
            f"expected layers among {having}: ReftConfig(layers={having})"
        )
    return chosen


def _check_shared(model: nn.Module, component: str, targets: Sequence[Target]) -> None:
    """Raise if layers share a module: each of its calls would apply the edits of all layers."""
    seen: dict[tuple[int, str], Target] = {}
    for target in targets:
        other = seen.setdefault((id(model.get_submodule(target.path)), target.side), target)
        if target.present and other is not target:
            raise ValueError(
                f"component: got {component!r}, but {other.path!r} and {target.path!r} are one "
                "module, which layers "
                f"{other.layer} and {target.layer} share; choose one of them: "
                f"layers=[{other.layer}]"
            )


class _TargetFactory:
    """Creates the targets of one model; caches what all layers share."""

    def __init__(self, model: nn.Module, component: str, embed_dim: int | None) -> None:
        self.model = model
        self.component = component
        self.embed_dim = embed_dim
        self.lists = block_lists(model)
        self.sides = side_paths(model)

    def tower(self, backbone: str) -> str:
        """Path of the module that runs the blocks at or below a backbone, without the heads."""
        below = next(
            (b for b in self.lists if not backbone or b.path.startswith(f"{backbone}.")), None
        )
        return backbone if below is None else backbone_path(self.model, f"{below.path}.0")

    def absent(self, layer: int, path: str) -> Target:
        """The target of a layer that another pipeline stage owns."""
        containing = _containing_block(self.lists, path)
        width = self.embed_dim
        if width is None and containing is not None:
            list_path, blocks = containing[0]
            width = between_blocks(self.model, list_path, next(b for b in blocks if size(b)))
        if width is None:
            raise ValueError(
                f"embed_dim: got None, but the width of {path!r}, which is in another process, is "
                "unknown; expected an integer: ReftConfig(embed_dim=...)"
            )
        return Target(layer, path, "output", width, False, present=False)

    def present(self, layer: int, path: str, side: str) -> Target:
        """The target of a module in this process.

        Args:
            layer: layer number.
            path: module path.
            side: "input" or "output".

        Raises:
            ValueError: the hidden state there cannot be edited, or its width is unknown.
        """
        model = self.model
        module = model.get_submodule(path)
        block_list, block_path = _containing_block(self.lists, path) or (None, None)
        is_block = path == block_path
        enc_dec = _side_of(self.sides, path)
        backbone = backbone_path(model, path)
        stream = stream_of(model, path, backbone, block_list)
        reason = unsupported_target_reason(model, path, side, enc_dec) or unsuitable_reason(
            model, path, stream
        )
        if reason is None and block_path and holds_maps(model.get_submodule(block_path)):
            reason = (
                "its block is convolutional: it holds channels first, [B, C, ...], not rows of "
                "tokens"
            )
        if reason is not None:
            raise ValueError(
                f"component: got {self.component!r}; the {side} of {path!r} cannot be edited: "
                f"{reason}"
            )
        return Target(
            layer,
            path,
            side,
            place_width(model, path, module, block_path, side, self.embed_dim),
            is_block and side == "output",
            stream=stream,
            layout=layout_of(model, path, self.tower(backbone), is_block, enc_dec),
        )


def resolve(
    model: nn.Module,
    component: str,
    layers: str | list[int] = "all",
    *,
    embed_dim: int | None = None,
) -> Component:
    """Find the targets of a component. Does not change the model.

    Args:
        model: the model.
        component: a role or a module path; see :mod:`reft_kernels.model.components`.
        layers: "all" or layer numbers, in the order in which the weights are stacked. Each layer
            must have the component.
        embed_dim: width of the targets; needed only if neither the configuration nor the weights
            determine it.

    Raises:
        ValueError: ``component`` matches no module or cannot be edited, ``layers`` are out of range
            or lack the component, or ``embed_dim`` is needed. The message lists valid values.
    """
    side, role = None, component
    head, _, rest = component.partition(".")
    if (head in ("encoder", "decoder") or head in TOWERS) and rest in (*ROLES, "projector"):
        side, role = head, rest
    if role == "projector" and (side is None or side in TOWERS):
        places = _projector(model, component, side)
    elif role in ROLES:
        places = _by_role(model, role, side)
    else:
        places = _by_path(model, component)
    chosen = _choose(component, layers, places)
    factory = _TargetFactory(model, component, embed_dim)
    targets = tuple(
        factory.absent(n, places.absent[n])
        if n in places.absent
        else factory.present(n, *places.found[n])
        for n in chosen
    )
    _check_shared(model, component, targets)
    enc_dec = _side_of(factory.sides, targets[0].path)
    return Component(
        targets, backbone_path(model, targets[0].path), enc_dec == "encoder", enc_dec == "decoder"
    )
