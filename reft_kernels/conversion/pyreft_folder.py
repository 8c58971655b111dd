"""Folders of pyreft 0.1.0 and pyvene.

A folder holds ``config.json`` and a file ``intkey_{key}.bin`` for each intervention. The file of
LoReFT holds ``weight [r, d]``, ``bias [r]`` and ``rotate_layer [d, r]`` (R^T in fp32). The file of
another intervention holds the state of a module: ``learned_source`` (a vector, or ``.weight`` and
``.bias``), ``proj_layer.weight`` or the parametrization of R, and two sizes.

The folder contains neither positions, dtype, activation, dropout nor add_bias:

* ``pyreft.ReftModel.load`` creates ``learned_source`` in bf16 (pyreft's default). It is therefore
  written in bf16, unless ``--dtype`` is given or the source has another dtype.
* An activation other than linear would be lost, so it is an error.
* ``ReftModel.load`` cannot load NoReFT and NodiReFT, for which it does not pass ``add_bias``, nor
  string components, whose width it does not know. Build such a model and call
  ``load_intervention``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.activations import canonical_activation
from reft_kernels.adapter_files import ConversionError, read_bin, read_json, write_json
from reft_kernels.conversion.common import DTYPES, Options, SavedAdapter, Weights, cast
from reft_kernels.conversion.pyreft_keys import (
    SAME_ROLES,
    Key,
    our_component,
    parse_file_key,
    their_component,
)
from reft_kernels.integrations.torch_orthogonal_state import BASE, ORIGINAL, evaluate, state

NAME = "pyreft"
CONFIG = "config.json"
MODEL = "pytorch_model.bin"

_CLASSES = {
    "loreft": "LoreftIntervention",
    "noreft": "NoreftIntervention",
    "consreft": "ConsreftIntervention",
    "lobireft": "LobireftIntervention",
    "direft": "DireftIntervention",
    "nodireft": "NodireftIntervention",
}
_MEMBERS = {name: member for member, name in _CLASSES.items()}
_FIELDS = (  # the fields of pyvene's RepresentationConfig, in order
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
_DEFAULTS = {"layer": 0, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
_SIZES = {"embed_dim", "interchange_dim"}


def matches(folder: Path) -> bool:
    """Return whether the folder contains interventions of pyvene."""
    return any(folder.glob("intkey_*.bin"))


# ---- Reading


def _representations(path: Path) -> tuple[list[Key], list[str], dict[str, Any]]:
    """Read config.json.

    Returns:
        The keys and the class names of the interventions, and the whole configuration.

    Raises:
        ConversionError: If the file is malformed or contains linked interventions.
    """
    config = read_json(path)
    listed, types = config.get("representations"), config.get("intervention_types")
    if not isinstance(listed, list) or not listed:
        raise ConversionError(
            f"{path}: has no 'representations'; expected the configuration of a pyreft or pyvene "
            "model"
        )
    types = [types] * len(listed) if isinstance(types, str) else types
    if not isinstance(types, list) or len(types) != len(listed):
        raise ConversionError(
            f"{path}: intervention_types does not name a class for each of {len(listed)} "
            "representations"
        )
    counts: dict[str, int] = {}
    keys = []
    for entry in listed:
        if not isinstance(entry, dict | list):
            raise ConversionError(
                f"{path}: a representation is {entry!r}, expected a list or an object"
            )
        fields: dict[str, Any] = {
            **_DEFAULTS,
            **(entry if isinstance(entry, dict) else dict(zip(_FIELDS, entry, strict=False))),
        }
        for name in ("intervention_link_key", "moe_key"):
            if fields.get(name) is not None:
                raise ConversionError(
                    f"{name}: got {fields[name]!r}, which neither AdapterHub's nor our folder can "
                    "express"
                )
        key = Key(
            int(fields["layer"] or 0),
            str(fields["component"]),
            str(fields["unit"]),
            int(fields["max_number_of_units"]),
            0,
        )
        place = key.names()[0]
        keys.append(key._replace(number=counts.get(place, 0)))
        counts[place] = counts.get(place, 0) + 1
    names = [str(t).removeprefix("<class '").removesuffix("'>").rsplit(".", 1)[-1] for t in types]
    return keys, names, config


def _by_config(folder: Path) -> tuple[list[tuple[Key, Path]], str, dict[str, Any]]:
    """Return the keys with their files, the intervention's name and the configuration."""
    keys, names, config = _representations(folder / CONFIG)
    unknown = sorted(set(names) - _MEMBERS.keys())
    if unknown or len(set(names)) > 1:
        raise ConversionError(
            f"intervention_types: got {', '.join(sorted(set(names)))}, expected one of "
            f"{', '.join(_MEMBERS)} for all layers"
        )
    files = []
    for key in keys:
        candidates = [folder / f"intkey_{name}.bin" for name in key.names()]
        file = next((path for path in candidates if path.exists()), None)
        if file is None:
            raise ConversionError(
                f"{candidates[0]}: is missing ({candidates[1].name}, the older spelling, too)"
            )
        files.append((key, file))
    foreign = sorted(
        {p.name for p in folder.glob("intkey_*.bin")} - {path.name for _, path in files}
    )
    if foreign:
        raise ConversionError(f"{folder / foreign[0]}: is not in config.json's representations")
    return files, _MEMBERS[names[0]], config


def _by_names(folder: Path) -> list[tuple[Key, Path]]:
    """Return the keys with their files for a folder without config.json."""
    files = sorted(folder.glob("intkey_*.bin"))
    if not files:
        raise ConversionError(f"{folder}: holds neither {CONFIG} nor intkey_*.bin")
    return [(parse_file_key(p.name.removeprefix("intkey_").removesuffix(".bin")), p) for p in files]


def _infer(names: set[str], path: Path) -> str:
    """Determine the intervention from the names of its tensors; raise if they are ambiguous."""
    if "rotate_layer" in names:
        return "loreft"
    ambiguous = ("noreft", "nodireft") if "proj_layer.weight" in names else ("consreft", "lobireft")
    if "proj_layer.weight" not in names and "learned_source.weight" in names:
        return "direft"
    raise ConversionError(
        f"{path}: may be {ambiguous[0]} or {ambiguous[1]}, and there is no {CONFIG}; say "
        "--intervention"
    )


def _weights(tensors: dict[str, Tensor], intervention: str, path: Path) -> Weights:
    """Return the tensors of a file under the names of the common form."""
    if intervention == "loreft":
        required = {"weight": "read", "bias": "bias", "rotate_layer": "write"}
    elif intervention in ("consreft", "lobireft"):
        required = {"learned_source": "bias"}
    else:
        required = {"learned_source.weight": "read", "learned_source.bias": "bias"}
    free = intervention in ("noreft", "nodireft")
    if free:
        required["proj_layer.weight"] = "write"
    parts = (
        ()
        if free or intervention == "loreft"
        else (f"rotate_layer.{ORIGINAL}", f"rotate_layer.{BASE}")
    )
    optional = {"proj_layer.bias": "subtract_bias"} if free else {}
    missing = sorted({*required, *parts} - tensors.keys())
    foreign = sorted(tensors.keys() - {*required, *parts, *optional} - _SIZES)
    if missing or foreign:
        raise ConversionError(f"{path}: {intervention} lacks {missing} and does not know {foreign}")
    weights = {
        common_name: tensors[name]
        for name, common_name in (required | optional).items()
        if name in tensors
    }
    if parts:
        weights["write"] = evaluate(tensors[parts[0]], tensors[parts[1]], str(path)).mT.contiguous()
    elif not free:
        if weights["write"].dim() != 2:
            raise ConversionError(
                f"{path}: rotate_layer is {tuple(weights['write'].shape)}, expected [d, r]"
            )
        weights["write"] = weights["write"].mT.contiguous()
    return weights


def _head(folder: Path, options: Options) -> list[str]:
    """Return the names of saved parameters of the base model (``include_model``).

    pyvene also writes the file if there are none.
    """
    saved = list(read_bin(folder / MODEL)) if (folder / MODEL).exists() else []
    if saved and not options.without_head:
        raise ConversionError(
            f"{folder / MODEL}: trained parameters of the model ({saved[0]}), which are not "
            "converted; "
            "--without-head leaves them out"
        )
    return saved


def read(folder: Path, options: Options) -> SavedAdapter:
    """Read the adapter in a folder.

    Without ``config.json``, layers and components are determined from the file names.

    Raises:
        ConversionError: If a class, key or component has no equivalent, or if tensors are missing,
            unknown or have the wrong shape.
    """
    config: dict[str, Any] = {}
    intervention = options.intervention
    if (folder / CONFIG).exists():
        files, named, config = _by_config(folder)
        if intervention not in (None, named):
            raise ConversionError(
                f"intervention: got {intervention!r}, but the folder holds {named}"
            )
        intervention = named
    else:
        files = _by_names(folder)
    layers: dict[int, dict[int, Weights]] = {}
    components: set[str] = set()
    for key, path in files:
        layer, component = our_component(key, options.component)
        components.add(component)
        tensors = read_bin(path)
        intervention = intervention or _infer(set(tensors), path)
        if key.number in layers.setdefault(layer, {}):
            raise ConversionError(
                f"{path}: a second intervention of layer {layer} at another component; expected "
                "one component"
            )
        layers[layer][key.number] = _weights(tensors, intervention, path)
    assert intervention is not None  # there is at least one file
    if len(components) != 1:
        raise ConversionError(
            f"component: got several, {', '.join(sorted(components))}; expected one for all layers"
        )
    for layer, numbered in layers.items():
        if sorted(numbered) != list(range(len(numbered))):
            raise ConversionError(
                f"layer {layer}: got interventions {sorted(numbered)}, expected them counted from 0"
            )
    ordered = {
        n: [layers[n][i] for i in sorted(layers[n])] for n in (layers if config else sorted(layers))
    }
    if intervention == "nodireft":  # pyreft stores the bias of its projection but does not use it
        for sets in ordered.values():
            for weights in sets:
                weights.pop("subtract_bias", None)
    dtype = next(iter(ordered.values()))[0]["bias"].dtype
    head = _head(folder, options)
    return SavedAdapter(
        intervention=intervention,
        component=components.pop(),
        layers=ordered,
        details={
            NAME: {
                "model_type": config.get("model_type"),
                "dtype": str(dtype).removeprefix("torch."),
            }
        },
        unheld=("positions", "pyreft_positions", "activation", "dropout", "all_layers"),
        notes=[f"left out {len(head)} trained parameters of the model ({MODEL})"] if head else [],
    )


# ---- Writing


def _state(weights: Weights, intervention: str, dtype: str) -> dict[str, Tensor]:
    """Return the state dict of an intervention.

    As in pyreft, the learned source is in ``dtype``; R and constant sources are in fp32.
    """
    width = weights["write"].shape[1]
    if intervention == "loreft":
        return {
            "weight": cast(weights["read"], dtype),
            "bias": cast(weights["bias"], dtype),
            "rotate_layer": cast(weights["write"].mT, None),
        }
    tensors = {name: torch.tensor(width) for name in sorted(_SIZES)}
    if intervention in ("consreft", "lobireft"):
        tensors["learned_source"] = cast(weights["bias"], None)
    else:
        tensors["learned_source.weight"] = cast(weights["read"], dtype)
        tensors["learned_source.bias"] = cast(weights["bias"], dtype)
    if intervention in ("noreft", "nodireft"):
        tensors["proj_layer.weight"] = cast(weights["write"], dtype)
        if "subtract_bias" in weights:
            tensors["proj_layer.bias"] = cast(weights["subtract_bias"], dtype)
        return tensors
    original, base = state(cast(weights["write"].mT, None))
    return {**tensors, f"rotate_layer.{ORIGINAL}": original, f"rotate_layer.{BASE}": base}


def _order(adapter: SavedAdapter) -> list[tuple[int, int]]:
    """Return (layer, set) pairs in pyreft's order: the first sets of all layers, then the last."""
    return [(layer, index) for index in range(1 + adapter.untied) for layer in adapter.layers]


def write(adapter: SavedAdapter, folder: Path, options: Options) -> None:
    """Write the adapter to a folder.

    Raises:
        ConversionError: If the activation is not linear, or pyvene does not have the component.
    """
    if canonical_activation(adapter.activation) != "linear":
        raise ConversionError(
            f"activation: got {adapter.activation!r}, but a pyreft folder has no place for "
            "act_fn, and would load as linear"
        )
    details = adapter.details.get(NAME, {})
    source_dtype = details.get("dtype")
    dtype = options.dtype or (source_dtype if source_dtype in DTYPES else None) or "bfloat16"
    representations, keys = [], []
    for layer, index in _order(adapter):
        weights = adapter.layers[layer][index]
        key = Key(layer, their_component(adapter.component, layer), "pos", 1, index)
        keys.append(key.names()[0])
        torch.save(_state(weights, adapter.intervention, dtype), folder / f"intkey_{keys[-1]}.bin")
        fields = {
            **_DEFAULTS,
            "layer": layer,
            "component": key.component,
            "low_rank_dimension": adapter.rank,
        }
        representations.append([fields.get(name) for name in _FIELDS])
    count = len(keys)
    # pyvene writes model_type with transformers 4
    model_type = {"model_type": details["model_type"]} if details.get("model_type") else {}
    write_json(
        folder / CONFIG,
        {
            "intervention_constant_sources": [True] * count,
            "intervention_dimensions": [adapter.embed_dim] * count,
            "intervention_types": [
                f"<class 'pyreft.interventions.{_CLASSES[adapter.intervention]}'>"
            ]
            * count,
            "mode": "parallel",
            **model_type,
            "representations": representations,
            "sorted_keys": keys,
        },
    )
    _remark(adapter, dtype)


def _remark(adapter: SavedAdapter, dtype: str) -> None:
    """Add notes about what the written folder does not contain."""
    notes = adapter.notes
    if adapter.dropout:
        notes.append(
            f"a pyreft folder has no place for dropout ({adapter.dropout}); say it again where "
            "you train on"
        )
    if adapter.intervention in ("noreft", "nodireft") or adapter.component not in SAME_ROLES:
        what = (
            "string components"
            if adapter.component not in SAME_ROLES
            else f"{adapter.intervention} (add_bias)"
        )
        notes.append(
            f"pyreft.ReftModel.load cannot load {what}: build the model yourself and use "
            "load_intervention"
        )
    learned = [
        w[name]
        for _, _, w in adapter.sets()
        for name in ("read", "bias")
        if name in w and adapter.kind.reads
    ]
    if any(not torch.equal(t.double(), t.to(DTYPES[dtype]).double()) for t in learned):
        notes.append(
            f"learned_source is rounded to {dtype}"
            + ("; --dtype float32 keeps it" if dtype == "bfloat16" else "")
        )
