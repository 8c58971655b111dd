"""Folders of AdapterHub's ``adapters`` package.

A folder holds ``adapter_config.json`` and ``pytorch_adapter.bin`` or ``adapter.safetensors``. The
key of a tensor is ``{path of the blocks}.{layer}.reft_layer.refts.{name}.units.{unit}.``, followed
by one of

    learned_source.weight                         [r, d]  W or W1
    learned_source.bias                           [r]     b
    projection.weight                             [r, d]  W2, without orthogonality
    projection.parametrizations.weight.original   [r, d]  state of R, with orthogonality
    projection.parametrizations.weight.0.base     [d, d]

With tied weights there is one unit, otherwise two (prefix and suffix), even if one of them has no
positions.

The settings ``orthogonality`` and ``subtract_projection`` determine the intervention. ``adapters``
1.3.0 does not save ``subtract_projection``, and reads its own DiReFT (NodiReFT here) as NoReFT. A
folder without the setting is read in the same way; use ``--intervention nodireft`` to correct it.
Folders written by this module contain the setting, and ``adapters`` 1.3.0 reads it.

The format does not support ConsReFT, LobiReFT, RED, the positions "prompt" and "all", components
other than the output of a block, and the layer numbers of encoder-decoder models. Its positions
are counted from the ends of the whole sequence, those of this package from the ends of the prompt.
They agree if there are no labels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.activations import canonical_activation
from reft_kernels.adapter_files import (
    ConversionError,
    read_bin,
    read_json,
    read_safetensors,
    write_json,
)
from reft_kernels.conversion.common import (
    Options,
    SavedAdapter,
    Weights,
    cast,
    fold_subtract_bias,
    required_positions,
)
from reft_kernels.integrations.torch_orthogonal_state import BASE, ORIGINAL, evaluate, state

NAME = "adapterhub"
CONFIG = "adapter_config.json"
BIN, SAFETENSORS = "pytorch_adapter.bin", "adapter.safetensors"
HEADS = ("pytorch_model_head.bin", "model_head.safetensors")
VERSION = "adapters.1.3.0"

_KEY = re.compile(r"^(?:(.+)\.)?(\d+)\.reft_layer\.refts\.([^.]+)\.units\.(\d+)\.(.+)$")
_KINDS = {
    (True, True): "loreft",
    (True, False): "direft",
    (False, True): "noreft",
    (False, False): "nodireft",
}
_SWITCHES = {name: switches for switches, name in _KINDS.items()}
# Activation names in files without "version"; adapters translates them in the same way
_RENAMED = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_ACTIVATIONS = {"linear": None, "gelu_tanh": "gelu_pytorch_tanh"}  # other names are the same
_ENCODER_DECODERS = ("t5", "mt5", "bart", "mbart", "plbart", "encoder-decoder")
_MODEL_SETTINGS = ("name", "model_class", "model_name", "model_type", "hidden_size")


def matches(folder: Path) -> bool:
    """Return whether the folder contains an AdapterHub adapter of any method."""
    return (folder / CONFIG).is_file() and isinstance(
        read_json(folder / CONFIG).get("config"), dict
    )


def _tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    if (folder / SAFETENSORS).is_file():
        return folder / SAFETENSORS, read_safetensors(folder / SAFETENSORS)[0]
    return folder / BIN, read_bin(folder / BIN)


def _units(
    path: Path, tensors: dict[str, Tensor]
) -> tuple[str, dict[int, dict[int, dict[str, Tensor]]]]:
    """Return the path of the blocks, and the tensors by layer, unit and name."""
    places: set[tuple[str, str]] = set()
    units: dict[int, dict[int, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise ConversionError(
                f"{path}: {key!r} is no ReFT weight; expected "
                f"'...{{layer}}.reft_layer.refts.{{name}}.units...'"
            )
        places.add((match[1] or "", match[3]))
        units.setdefault(int(match[2]), {}).setdefault(int(match[4]), {})[match[5]] = tensor
    if len(places) != 1:
        raise ConversionError(
            f"{path}: weights of several adapters or stacks of blocks {sorted(places)}, expected "
            "one"
        )
    return places.pop()[0], units


def _weights(unit: dict[str, Tensor], orthogonal: bool, where: str) -> Weights:
    original, base = f"projection.{ORIGINAL}", f"projection.{BASE}"
    expected = {
        "learned_source.weight",
        "learned_source.bias",
        *((original, base) if orthogonal else ("projection.weight",)),
    }
    if unit.keys() != expected:
        raise ConversionError(
            f"{where}: got {sorted(unit)}, expected {sorted(expected)}, as its configuration says"
        )
    write = evaluate(unit[original], unit[base], where) if orthogonal else unit["projection.weight"]
    return {
        "write": write,
        "read": unit["learned_source.weight"],
        "bias": unit["learned_source.bias"],
    }


def _positions(config: dict[str, Any]) -> str:
    first, last = (config.get(f"{side}_positions", 0) for side in ("prefix", "suffix"))
    terms = [f"{letter}{count}" for letter, count in (("f", first), ("l", last)) if count]
    if not terms:
        raise ConversionError(
            f"prefix_positions, suffix_positions: got {first} and {last}, expected one above 0"
        )
    return "+".join(terms)


def _activation(content: dict[str, Any]) -> str:
    name = content["config"].get("non_linearity")
    if "version" not in content:
        name = _RENAMED.get(name, name)
    try:
        return canonical_activation(name)
    except ValueError as error:
        raise ConversionError(f"non_linearity: {error}") from None


def read(folder: Path, options: Options) -> SavedAdapter:
    """Read the adapter in a folder.

    Raises:
        ConversionError: If the folder holds another method, a prediction head or an adapter of an
            encoder-decoder model, if the activation is unknown, or if tensors are missing or
            unknown.
    """
    content = read_json(folder / CONFIG)
    config = content["config"] if isinstance(content.get("config"), dict) else {}
    if config.get("architecture") != "reft":
        raise ConversionError(
            f"{folder / CONFIG}: architecture is {config.get('architecture')!r}, expected 'reft'"
        )
    if content.get("model_type") in _ENCODER_DECODERS:
        raise ConversionError(
            f"model_type: {content['model_type']!r} counts layers over encoder and decoder; not "
            "converted"
        )
    heads = [name for name in HEADS if (folder / name).exists()]
    if heads and not options.without_head:
        raise ConversionError(
            f"{folder / heads[0]}: a prediction head, which is not converted; --without-head "
            "leaves it out"
        )
    path, tensors = _tensors(folder)
    blocks, units = _units(path, tensors)
    orthogonal, subtract_projection = (
        bool(config.get("orthogonality", True)),
        config.get("subtract_projection"),
    )
    positions = _positions(config)
    count = 1 if config.get("tied_weights", False) else 2
    layers: dict[int, list[Weights]] = {}
    spare: dict[int, Weights] = {}
    listed = config.get("layers", "all")
    if listed != "all" and sorted(listed) != sorted(units):
        raise ConversionError(
            f"layers: the configuration says {listed}, the file holds {sorted(units)}"
        )
    for layer in sorted(units) if listed == "all" else listed:
        if sorted(units[layer]) != list(range(count)):
            raise ConversionError(
                f"{path}: layer {layer} has units {sorted(units[layer])}, expected {count}, as "
                "tied_weights says"
            )
        sets = [
            _weights(units[layer][i], orthogonal, f"{path}: layer {layer}, unit {i}")
            for i in range(count)
        ]
        if count == 2 and "+" not in positions:  # one of the two units has no positions
            spare[layer] = sets.pop(1 if positions[0] == "f" else 0)
        layers[layer] = sets
    adapter = SavedAdapter(
        intervention=options.intervention
        or _KINDS[orthogonal, True if subtract_projection is None else bool(subtract_projection)],
        component="block_output",
        layers=layers,
        positions=positions,
        all_layers=listed == "all",
        activation=_activation(content),
        dropout=float(config.get("dropout", 0.0)),
        base_model=content.get("model_name"),
        spare=spare,
        details={
            NAME: {
                "path": blocks,
                "dtype": config.get("dtype"),
                **{k: content.get(k) for k in _MODEL_SETTINGS},
            }
        },
    )
    if subtract_projection is None and options.intervention is None:
        adapter.notes.append(
            "the folder does not say subtract_projection, so it is read as "
            f"{adapter.intervention}, as adapters reads it; "
            f"say --intervention {'direft' if orthogonal else 'nodireft'} where it was trained "
            "without"
        )
    if _SWITCHES.get(adapter.intervention, (None,))[0] != orthogonal:
        raise ConversionError(
            f"intervention: got {adapter.intervention!r}, but the folder's orthogonality is "
            f"{orthogonal}"
        )
    if heads:
        adapter.notes.append(f"left out the prediction head ({heads[0]})")
    return adapter


def _model(adapter: SavedAdapter, options: Options) -> dict[str, Any]:
    """Return the settings that describe the model; "path" is the path of its blocks."""
    known = dict(adapter.details.get(NAME, {}))
    component = adapter.component.replace("[{layer}]", ".{layer}")
    if component != "block_output":
        if not component.endswith(".{layer}"):
            raise ConversionError(
                f"component: got {adapter.component!r}, but AdapterHub edits the output of blocks "
                "only"
            )
        return {**known, "path": component.removesuffix(".{layer}")}
    if options.base_model is None and "path" in known:
        return known
    name = options.base_model or adapter.base_model
    if name is None:
        raise ConversionError(
            "base-model: AdapterHub's keys need the path of the model's blocks; say --base-model "
            "NAME_OR_FOLDER"
        )
    return {**known, **_look_up(name)}


def _look_up(name: str) -> dict[str, Any]:
    """Determine the settings of :func:`_model` from a model's configuration."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(name)
        if getattr(config, "is_encoder_decoder", False):
            raise ConversionError(
                f"base-model: {name!r} is an encoder-decoder, whose layers AdapterHub counts over "
                "both; not converted"
            )
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
    except ConversionError:
        raise
    except Exception as error:  # configurations and the hub raise many types
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(f"base-model: {name!r} cannot be looked up: {line}") from None
    from reft_kernels.model.components import find_blocks

    blocks = find_blocks(model)
    if blocks is None:
        raise ConversionError(
            f"base-model: {name!r} ({type(model).__name__}) has no list of blocks"
        )
    architectures = getattr(config, "architectures", None) or [type(model).__name__]
    return {
        "path": f"{model.base_model_prefix}.{blocks.path}",
        "model_type": config.model_type,
        "model_name": name,
        "model_class": architectures[0],
        "hidden_size": getattr(config, "hidden_size", None),
    }


def _stored(adapter: SavedAdapter, weights: Weights, dtype: str | None) -> dict[str, Tensor]:
    stored = {
        "learned_source.weight": cast(weights["read"], dtype),
        "learned_source.bias": cast(fold_subtract_bias(adapter, weights, "AdapterHub"), dtype),
    }
    if not adapter.kind.orthonormal:
        return {**stored, "projection.weight": cast(weights["write"], dtype)}
    original, base = state(cast(weights["write"], None))  # R is fp32, as in adapters
    return {**stored, f"projection.{ORIGINAL}": original, f"projection.{BASE}": base}


def write(adapter: SavedAdapter, folder: Path, options: Options) -> None:
    """Write the adapter to a folder.

    Raises:
        ConversionError: If AdapterHub does not support the intervention, component or positions, or
            if the base model cannot be looked up.
    """
    if adapter.intervention not in _SWITCHES:
        raise ConversionError(
            f"intervention: AdapterHub has no {adapter.intervention}; it has {', '.join(_SWITCHES)}"
        )
    spec = required_positions(adapter)
    if spec.kind != "ends" or spec.modality is not None:
        raise ConversionError(
            f"positions: got {adapter.positions!r}, but AdapterHub edits first and last tokens "
            "only ('fN+lM')"
        )
    if adapter.pyreft_positions:
        raise ConversionError(
            "pyreft_positions: got True, but AdapterHub counts the last token, which pyreft's "
            "datasets leave out"
        )
    model = _model(adapter, options)
    name, dtype = model.get("name") or "reft", options.dtype or model.get("dtype")
    units = {n: list(sets) for n, sets in adapter.layers.items()}
    for layer, unused in adapter.spare.items():
        units[layer].insert(1 if spec.first else 0, unused)
    tensors = {
        f"{model['path']}.{layer}.reft_layer.refts.{name}.units.{i}.".lstrip(".") + key: tensor
        for layer, sets in units.items()
        for i, weights in enumerate(sets)
        for key, tensor in _stored(adapter, weights, dtype).items()
    }
    orthogonal, subtract_projection = _SWITCHES[adapter.intervention]
    config = {
        "architecture": "reft",
        "layers": "all" if adapter.all_layers else list(adapter.layers),
        "prefix_positions": spec.first,
        "suffix_positions": spec.last,
        "r": adapter.rank,
        "orthogonality": orthogonal,
        "subtract_projection": subtract_projection,
        "tied_weights": len(next(iter(units.values()))) == 1,
        "dropout": adapter.dropout,
        "dtype": dtype,
        "non_linearity": _ACTIVATIONS.get(adapter.activation, adapter.activation),
        "output_reft": True,
        "init_weights_seed": None,
    }
    content = {k: model.get(k) for k in _MODEL_SETTINGS}
    content["hidden_size"] = content["hidden_size"] or adapter.embed_dim
    write_json(folder / CONFIG, {**content, "name": name, "config": config, "version": VERSION})
    torch.save(tensors, folder / BIN)
