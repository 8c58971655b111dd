"""Intervention keys and component names of pyvene.

A key has one of the forms

    layer_{l}_comp_{c}_unit_{u}_nunit_{n}#{i}
    comp_{c}_unit_{u}_nunit_{n}#{i}

The second form is for a component given by a string such as ``model.layers[1].output``; its dots
are replaced by underscores. Before pyvene 0.1.7, both forms used dots in place of underscores. i
numbers the interventions at one place: with untied weights, #0 is for first and #1 for last
positions.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from reft_kernels.adapter_files import ConversionError
from reft_kernels.model.components import ROLES

SAME_ROLES = tuple(
    role for role in ROLES if role != "mlp_activation" and not role.startswith("mixer")
)
"""Roles that denote the same tensor in pyvene and in this package."""

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
    """The place of one intervention, as given in config.json or in a file name."""

    layer: int
    component: str
    unit: str
    num_units: int
    number: int  # among the interventions at this place

    def names(self) -> tuple[str, str]:
        """Return the key as written since pyvene 0.1.7, and as written before."""
        unit = self.unit.replace(".", "_")
        if "." in self.component:
            component = self.component.replace(".", "_")
            return (
                f"comp_{component}_unit_{unit}_nunit_{self.num_units}#{self.number}",
                f"comp.{self.component}.unit.{self.unit}.nunit.{self.num_units}#{self.number}",
            )
        return (
            f"layer_{self.layer}_comp_{self.component}_unit_{unit}_nunit_{self.num_units}#{self.number}",
            f"layer.{self.layer}.comp.{self.component}.unit.{self.unit}.nunit.{self.num_units}#{self.number}",
        )


def parse_file_key(key: str) -> Key:
    """Parse the key in a file name.

    In a component given by a string, replaced dots cannot be distinguished from underscores.

    Raises:
        ConversionError: If ``key`` has none of the known forms.
    """
    for form in _FILES:
        match = form.match(key)
        if match is not None:
            groups = match.groupdict()
            return Key(
                int(groups.get("layer") or 0),
                groups["component"],
                groups["unit"],
                int(groups["count"]),
                int(groups["index"]),
            )
    raise ConversionError(
        f"intkey_{key}.bin: expected 'layer_{{l}}_comp_{{c}}_unit_{{u}}_nunit_{{n}}#{{i}}' or its "
        "spelling with dots"
    )


def _from_underscores(component: str) -> str | None:
    """Restore the dots of a string component, or return None if they are ambiguous.

    This is possible for the output or input of a block, such as ``model_layers[1]_output``.
    """
    match = re.fullmatch(r"(\w+?)_(\w+\[\d+\])_(output|input)", component)
    return None if match is None or "_" in match[1] else f"{match[1]}.{match[2]}.{match[3]}"


def our_component(key: Key, stated: str | None) -> tuple[int, str]:
    """Return the layer and this package's component name of a key.

    Args:
        key: The key.
        stated: The component name given by the user, which takes precedence, or None.

    Raises:
        ConversionError: If the unit is not a single token, or the component has no equivalent and
            ``stated`` is None.
    """
    if key.unit != "pos" or key.num_units != 1:
        raise ConversionError(
            f"unit: got {key.unit!r} with {key.num_units} units, expected tokens ('pos', 1)"
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
    """Return pyvene's name of a component in a layer.

    Args:
        component: This package's component name.
        layer: The layer number.

    Raises:
        ConversionError: If pyvene does not have the role or defines it differently.
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
