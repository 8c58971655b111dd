"""pyvene's names: components and intervention keys, in both spellings, and ours for the same
places.

    layer_{l}_comp_{c}_unit_{u}_nunit_{n}#{i}     since pyvene 0.1.7; before, a dot stands for each
    separator comp_{c}_unit_{u}_nunit_{n}#{i}               a string component such as
    ``model.layers[1].output``, dots replaced too

i counts the interventions at one place: untied weights are #0 (first positions) and #1 (last).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from reft_kernels.conversion.common import ConversionError
from reft_kernels.model.components import ROLES

SAME_ROLES = tuple(
    role for role in ROLES if role != "mlp_activation" and not role.startswith("mixer")
)
"""Roles that name the same tensor in pyvene and here."""

_INDEX = re.compile(r"\[(\d+)\]")
_FILES = (
    re.compile(
        r"^layer_(?P<layer>\d+)_comp_(?P<component>.+)_unit_(?P<unit>.+)_nunit_(?P<count>\d+)#(?P<index>\d+)$"
    ),
    re.compile(
        r"^layer\.(?P<layer>\d+)\.comp\.(?P<component>.+)\.unit\.(?P<unit>.+)\.nunit\.(?P<count>\d+)#(?P<index>\d+)$"
    ),
    re.compile(r"^comp_(?P<component>.+)_unit_(?P<unit>.+)_nunit_(?P<count>\d+)#(?P<index>\d+)$"),
    re.compile(
        r"^comp\.(?P<component>.+)\.unit\.(?P<unit>.+)\.nunit\.(?P<count>\d+)#(?P<index>\d+)$"
    ),
)


class Key(NamedTuple):
    """One intervention's place, as a representation of config.json or a file's name tells it."""

    layer: int
    component: str
    unit: str
    count: int
    index: int

    def names(self) -> tuple[str, str]:
        """The key in the spelling since 0.1.7, and in the one before."""
        unit = self.unit.replace(".", "_")
        if "." in self.component:
            component = self.component.replace(".", "_")
            return (
                f"comp_{component}_unit_{unit}_nunit_{self.count}#{self.index}",
                f"comp.{self.component}.unit.{self.unit}.nunit.{self.count}#{self.index}",
            )
        return (
            f"layer_{self.layer}_comp_{self.component}_unit_{unit}_nunit_{self.count}#{self.index}",
            f"layer.{self.layer}.comp.{self.component}.unit.{self.unit}.nunit.{self.count}#{self.index}",
        )


def parse_file_key(key: str) -> Key:
    """A key as a file's name spells it. The underscores of a string component cannot be told from
    its dots.

    Raises:
        ConversionError: not a key of either spelling.
    """
    for form in _FILES:
        match = form.match(key)
        if match is not None:
            found = match.groupdict()
            return Key(
                int(found.get("layer") or 0),
                found["component"],
                found["unit"],
                int(found["count"]),
                int(found["index"]),
            )
    raise ConversionError(
        f"intkey_{key}.bin: expected 'layer_{{l}}_comp_{{c}}_unit_{{u}}_nunit_{{n}}#{{i}}' or its "
        "spelling with dots"
    )


def _from_underscores(component: str) -> str | None:
    """A string component whose dots became underscores: only a block's own output or input can be
    read back.
    """
    match = re.fullmatch(r"(\w+?)_(\w+\[\d+\])_(output|input)", component)
    return None if match is None or "_" in match[1] else f"{match[1]}.{match[2]}.{match[3]}"


def our_component(key: Key, stated: str | None) -> tuple[int, str]:
    """(layer, our component) of a key; ``stated`` is what the user says, and wins.

    Raises:
        ConversionError: a unit other than tokens, several units, or a component without a
            counterpart that is not stated.
    """
    if key.unit != "pos" or key.count != 1:
        raise ConversionError(
            f"unit: got {key.unit!r} with {key.count} units, expected tokens ('pos', 1)"
        )
    indices = _INDEX.findall(key.component)
    layer = int(indices[0]) if indices else key.layer
    if stated is not None:
        return layer, stated
    if key.component in SAME_ROLES:
        return layer, key.component
    component = key.component if "." in key.component else _from_underscores(key.component)
    if component is None or not component.endswith((".output", ".input")) or len(indices) > 1:
        raise ConversionError(
            f"component: pyvene's {key.component!r} has no certain counterpart here; say "
            "--component, a module path such as "
            "'model.layers.{layer}.self_attn.q_proj' (its output) or '....o_proj.input'"
        )
    return layer, _INDEX.sub(".{layer}", component).removesuffix(".output")


def their_component(component: str, layer: int) -> str:
    """pyvene's component for ours in a layer.

    Raises:
        ConversionError: a role that pyvene gives another meaning, or has not.
    """
    if component in SAME_ROLES:
        return component
    if component in ROLES or component.split(".", 1)[-1] in ROLES:
        reason = (
            "is what the last projection reads, where pyvene's is the activation's own output, "
            "which differs in gated MLPs"
            if component == "mlp_activation"
            else "names one side of an encoder-decoder, which pyvene does not"
        )
        raise ConversionError(
            f"component: {component!r} {reason}; name a module path instead, such as "
            f"'model.layers.{{layer}}.mlp'"
        )
    path = component.replace(".{layer}", f"[{layer}]").replace("[{layer}]", f"[{layer}]")
    return path if path.endswith((".input", ".output")) else f"{path}.output"
