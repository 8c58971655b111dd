"""Finding what to edit: the blocks of a model by their structure, components within them, and the
width of each.

A component is a role or a module path:

    "block_output", "block_input"            the residual stream after or before each block
    "attention_output", "attention_input"    of the block's self-attention. Never linear attention,
                                             whose place is the
                                             mixer's, and never cross-attention, which is named by
                                             path
    "mixer_output", "mixer_input"            of the block's token mixer that is no attention: state
                                             space, linear attention,
                                             convolution, recurrence, Fourier transform
    "mlp_output", "mlp_input"                of the block's whole feed-forward. In a mixture of
                                             experts that is router, routed
                                             experts and shared expert together: what is added to
                                             the residual stream
    "mlp_activation"                         what the last projection of a dense feed-forward reads.
                                             A mixture has no single
                                             one, and refuses it
    "decoder.block_output", "encoder.mlp_output"   a role within one side of an encoder-decoder
                                                   model; a bare role means the
                                             encoder, which is where the prompt is
    "model.layers.{layer}.self_attn.o_proj"  a module path (``[{layer}]`` too): its output, or its
                                             input with ".input"

A role is the output of the module that does the part's work, which in some families adds the
residual stream itself (T5's layers, Bloom's feed-forward, the attention of BERT). A block without
the part, as in hybrids, is no error unless its layer is chosen. A block with several such parts, or
whose part is no single module, refuses the role, and so do architectures that
:mod:`reft_kernels.model.families` names. Roles of a model with several towers are of its language
model; other towers are named by path.

A module that runs several times in a forward (ALBERT's groups) is edited each time with the same
weights. One module under two layer numbers (blocks that share it) cannot have weights for each, and
is refused. An expert, and the keys and values of cross-attention, have no row for each token, and
are refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from reft_kernels.model.families import (
    REFUSED,
    ROLES_REFUSED,
    config_of,
    layout_of,
    model_type_of,
    why_refused,
)
from reft_kernels.model.roles import ROLES, Place, find_role, holds_maps, why_unfit
from reft_kernels.model.towers import (
    MODEL_INPUTS,
    TOKEN_INPUTS,
    BlockList,
    backbone_path,
    block_lists,
    find_blocks,
    side_paths,
    size,
    stream_of,
)
from reft_kernels.model.widths import place_width, stream_width

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
    """One place to edit: a module's input or output.

    Attributes:
        layer: layer number.
        path: module path in the model.
        side: "input" or "output".
        embed_dim: d, the last dimension of the hidden state there. inplace: the tensor is certainly
        fresh and seen by the next layer alone. present: the module is in this process (pipeline
        parallel replaces the others by empty ones).
        stream: "tokens": the hidden state has one row for each token of the backbone's call. "own":
            it has rows of its own (a tower of images or sounds, a projector, a resampler, image
            rows beside the tokens), counted by its own shape.
        layout: "btd": [B, T, d], or flattened [B * T, d]; "tbd": [T, B, d]; "btsd": [B, T, streams,
            d]; "sbtd":
            [streams, B, T, d]; "btd_padded": [B, T + padding, d], where the model pads the sequence
            on the right by itself, to a multiple of a window or block.
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
    """The targets of one component, and the backbone whose call brings the tokens that they
    belong to.
    """

    targets: tuple[Target, ...]
    backbone: str
    encoder: bool  # the encoder, or
    decoder: bool  # the decoder, of an encoder-decoder model


class _Places(NamedTuple):
    """What a component means: a place, or why there is none, for each layer."""

    found: dict[int, tuple[str, str]]  # layer -> (module path, "input" or "output")
    missing: dict[int, str]  # layer -> which module has none, and why, in words
    absent: dict[int, str]  # layer -> path of a block that another pipeline stage owns


def _list_of(lists: Sequence[BlockList], path: str) -> tuple[BlockList, str] | None:
    """The list of blocks that holds a path, and the path of the block."""
    for found in lists:
        if path.startswith(f"{found.path}."):
            number = path[len(found.path) + 1 :].split(".")[0]
            return found, f"{found.path}.{number}"
    return None


def _side_of(sides: dict[str, str], path: str) -> str | None:
    return next(
        (s for s, root in sides.items() if path == root or path.startswith(f"{root}.")), None
    )


def _candidates(model: nn.Module, found: BlockList | None, wanted: str = "") -> str:
    if found is None:
        names = [name for name, _ in model.named_modules() if name]
    else:
        block = next((b for b in found.blocks if size(b)), None)
        names = [f"{found.path}.{{layer}}"]
        names += [f"{found.path}.{{layer}}.{name}" for name, _ in block.named_modules() if name]
    close = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) if wanted else []
    ordered = close + [name for name in names if name not in close]
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


# ---- roles


def _by_role(model: nn.Module, role: str, side: str | None) -> _Places:
    found = find_blocks(model, side)
    kind = model_type_of(model, "" if found is None else found.path)
    if kind in REFUSED:
        raise ValueError(
            f"component: got {role!r}, which cannot be edited in {type(model).__name__} ({kind}): "
            f"{REFUSED[kind]}"
        )
    if kind in ROLES_REFUSED:
        raise ValueError(
            f"component: got {role!r}, but {type(model).__name__} ({kind}) has no such module: "
            f"{ROLES_REFUSED[kind]}"
        )
    if found is None:
        where = "" if side is None else f" in the {side}"
        raise ValueError(
            f"component: got {role!r}, but {type(model).__name__} has no list of blocks{where}; "
            "name modules by path, such as "
            "'model.layers.{layer}.mlp'"
        )
    places = _Places({}, {}, {})
    for layer, block in enumerate(found.blocks):
        path = f"{found.path}.{layer}"
        if not size(block):
            places.absent[layer] = path
            continue
        place = _role_in(model, path, block, role)
        if isinstance(place, str):
            places.missing[layer] = f"{type(block).__name__} ({path}) {place}"
        else:
            places.found[layer] = (f"{path}.{place.path}".rstrip("."), place.side)
    if not places.found and places.missing:
        block = next(b for b in found.blocks if size(b))
        path = next(f"{found.path}.{n}" for n, b in enumerate(found.blocks) if b is block)
        roles = ", ".join(r for r in ROLES if not isinstance(_role_in(model, path, block, r), str))
        first = next(iter(places.missing.values()))
        listed = f"it has {roles}, or name" if roles else "name"
        raise ValueError(
            f"component: got {role!r}, but {first}; {listed} a module by path: "
            f"{_candidates(model, found)}"
        )
    return places


def _role_in(model: nn.Module, path: str, block: nn.Module, role: str) -> Place | str:
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


# ---- paths


def _matches(model: nn.Module, pattern: str) -> dict[str, re.Match]:
    """The match of every module whose path is the pattern, or ends with it."""
    expression = re.escape(pattern).replace(re.escape("{layer}"), r"(\d+)")
    exact, ending = re.compile(expression), re.compile(rf"(?:.*\.)?{expression}")
    # a container is never called itself
    names = [
        name
        for name, m in model.named_modules()
        if name and not isinstance(m, nn.ModuleList | nn.ModuleDict)
    ]
    for form in (exact, ending):
        hits = {name: form.fullmatch(name) for name in names}
        hits = {name: hit for name, hit in hits.items() if hit is not None}
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
        found = find_blocks(model)
        raise ValueError(
            f"component: got {component!r}, which names no module of {type(model).__name__}; "
            "expected one of "
            f"{', '.join(ROLES)}, or a module path such as {_candidates(model, found, pattern)}"
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


# ---- the whole


def _choose(component: str, layers: str | list[int], places: _Places) -> list[int]:
    """The layer numbers to edit, in order."""
    available = sorted({*places.found, *places.missing, *places.absent})
    chosen = available if layers == "all" else list(layers)
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
    """One module at several layers would get every layer's edit at each of its calls."""
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


class _Maker:
    """Makes targets of one model; what it looks up once serves every layer."""

    def __init__(self, model: nn.Module, component: str, embed_dim: int | None) -> None:
        self.model = model
        self.component = component
        self.embed_dim = embed_dim
        self.lists = block_lists(model)
        self.sides = side_paths(model)

    def tower(self, backbone: str) -> str:
        """The module that is called for the blocks at or below a backbone: heads stand outside
        of it.
        """
        below = next(
            (b for b in self.lists if not backbone or b.path.startswith(f"{backbone}.")), None
        )
        return backbone if below is None else backbone_path(self.model, f"{below.path}.0")

    def absent(self, layer: int, path: str) -> Target:
        """The target of a layer that another pipeline stage owns."""
        found, _ = _list_of(self.lists, path)
        width = self.embed_dim or stream_width(
            self.model, found.path, next(b for b in found.blocks if size(b))
        )
        if width is None:
            raise ValueError(
                f"embed_dim: cannot tell the width of {path!r}, which is in another process; "
                "state it"
            )
        return Target(layer, path, "output", width, False, present=False)

    def present(self, layer: int, path: str, side: str) -> Target:
        """The target at a path, or an error that says why it cannot be edited."""
        model = self.model
        module = model.get_submodule(path)
        held = _list_of(self.lists, path)
        block_path = None if held is None else held[1]
        is_block = path == block_path
        enc_dec = _side_of(self.sides, path)
        backbone = backbone_path(model, path)
        stream = stream_of(model, path, backbone, None if held is None else held[0])
        reason = why_refused(model, path, side, enc_dec) or why_unfit(model, path, stream)
        if reason is None and held is not None and holds_maps(model.get_submodule(block_path)):
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
    """The targets of ``component`` in the given layers of ``model``; the model is not touched.

    Args:
        component: a role or a module path; see the module's text. layers: "all" or layer numbers,
        in the order in which the weights are stacked. Each must have the component.
        embed_dim: width of the targets, where neither the configuration nor the weights tell it.

    Raises:
        ValueError: naming ``component`` (it matches nothing, or cannot be edited: why, and what to
            name instead), ``layers`` (out of range, or without the component: which have it) or
            ``embed_dim`` (an unknown width).
    """
    side, role = None, component
    head, _, rest = component.partition(".")
    if head in ("encoder", "decoder") and rest in ROLES:
        side, role = head, rest
    places = _by_role(model, role, side) if role in ROLES else _by_path(model, component)
    chosen = _choose(component, layers, places)
    maker = _Maker(model, component, embed_dim)
    targets = tuple(
        maker.absent(n, places.absent[n])
        if n in places.absent
        else maker.present(n, *places.found[n])
        for n in chosen
    )
    _check_shared(model, component, targets)
    enc_dec = _side_of(maker.sides, targets[0].path)
    return Component(
        targets, backbone_path(model, targets[0].path), enc_dec == "encoder", enc_dec == "decoder"
    )
