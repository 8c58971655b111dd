"""Folders of the PEFT tuner of this package.

A folder holds ``adapter_config.json`` (``peft_type`` REFT) and ``adapter_model.safetensors``. The
tensors are stacked over layers, with leading dimensions ``[L]``, or ``[L, 2]`` if untied. Their
names start with ``base_model.model.representation_edits.d{width}.reft_stack.``:

    X ``[..., d, r]`` and signs ``[..., r]``, or W2 ``[..., r, d]``
    W or W1 ``[..., r, d]``
    b or s ``[..., r]``

All interventions except RED are converted; RED does not exist in the other formats.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.activations import canonical_activation
from reft_kernels.adapter_files import (
    ConversionError,
    read_json,
    read_safetensors,
    write_safetensors,
)
from reft_kernels.conversion.common import (
    Options,
    SavedAdapter,
    Weights,
    cast,
    fold_subtract_bias,
    required_positions,
)
from reft_kernels.interventions import STACKED, Intervention
from reft_kernels.model.components import ROLES
from reft_kernels.parametrization import INVERSES, PARAMETRIZATIONS, build

NAME = "peft"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"^(?:base_model\.model\.)?representation_edits\.d(\d+)\.reft_stack\.(\w+)$")
# Settings without an equivalent in other formats, kept for converting back
_PEFT_SETTINGS = ("task_type", "init", "revision", "response_template", "base_fingerprint")


def matches(folder: Path) -> bool:
    """Return whether the folder contains a PEFT adapter of any method."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def _names(kind: type[Intervention]) -> dict[str, str]:
    """Return the name in the common form of each stored tensor."""
    names = {"X": "X", "signs": "signs"} if kind.orthonormal else {"W2": "write"}
    if not kind.reads:
        return {**names, "s": "bias"}
    return {**names, ("W" if kind.orthonormal else "W1"): "read", "b": "bias"}


def _stacks(folder: Path, options: Options) -> tuple[int, dict[str, Tensor], list[str]]:
    """Read the weights.

    Returns:
        The width d, the stacked tensors by stored name, and the names of tensors of other trained
        modules.

    Raises:
        ConversionError: If there are no ReFT weights, or weights of several widths or of other
            modules.
    """
    tensors, _ = read_safetensors(folder / WEIGHTS)
    widths: dict[int, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            other.append(key)
        else:
            widths.setdefault(int(match[1]), {})[match[2]] = tensor
    if other and not options.without_head:
        raise ConversionError(
            f"modules_to_save: the adapter holds {other[0]} and {len(other) - 1} other tensors of "
            "trained modules, which are "
            "not converted; --without-head leaves them out"
        )
    if not widths:
        raise ConversionError(f"{folder / WEIGHTS}: holds no ReFT weights")
    if len(widths) > 1:
        raise ConversionError(
            f"component: edits of several widths {sorted(widths)}, which no other format holds; "
            "expected one"
        )
    ((width, stack),) = widths.items()
    return width, stack, other


def _layer_numbers(config: dict[str, Any], count: int, options: Options, where: Path) -> list[int]:
    """Return the layer numbers of the ``count`` stacked layers."""
    layers = config.get("layers", "all")
    if (
        layers == "all"
        and isinstance(options.layers, list)
        and config.get("component", "block_output") not in ROLES
    ):
        layers = options.layers
    if layers == "all":
        if config.get("component", "block_output") not in ROLES:
            raise ConversionError(
                f"layers: {where} says 'all' of a module path, which need not be 0 to "
                f"{count - 1}; say --layers"
            )
        return list(range(count))
    if not isinstance(layers, list) or len(layers) != count or len(set(map(str, layers))) != count:
        raise ConversionError(f"layers: got {layers}, but the file holds weights of {count} layers")
    return [int(n) for n in layers]


def read(folder: Path, options: Options) -> SavedAdapter:
    """Read the adapter in a folder.

    Raises:
        ConversionError: If the folder holds another method, RED, several widths or other trained
            modules, or if tensors are missing or have the wrong shape.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "REFT":
        raise ConversionError(
            f"{folder / CONFIG}: peft_type is {config.get('peft_type')!r}, expected 'REFT'"
        )
    intervention = config.get("intervention", "loreft")
    if intervention not in STACKED:
        raise ConversionError(
            f"intervention: got {intervention!r}, expected one of {', '.join(STACKED)}"
        )
    if intervention == "red":
        raise ConversionError(
            "intervention: red (scale * h + bias) has no counterpart in pyreft's or AdapterHub's "
            "folders"
        )
    width, stack, other = _stacks(folder, options)
    names = _names(STACKED[intervention])
    missing, foreign = sorted(names.keys() - stack.keys()), sorted(stack.keys() - names.keys())
    if missing or foreign:
        raise ConversionError(
            f"{folder / WEIGHTS}: {intervention} lacks {missing} and does not know {foreign}"
        )
    untied = not config.get("share_weights", True)
    for name, tensor in stack.items():
        dims = 2 + (name in ("X", "W", "W1", "W2")) + untied
        if tensor.dim() != dims or (untied and tensor.shape[1] != 2):
            raise ConversionError(
                f"{folder / WEIGHTS}: {name} is {tuple(tensor.shape)}, expected {dims} dimensions"
            )
    counts = {t.shape[0] for t in stack.values()}
    if len(counts) != 1:
        raise ConversionError(
            f"{folder / WEIGHTS}: tensors of {sorted(counts)} layers, expected one number"
        )
    parametrization = config.get("parametrization", "householder")
    if parametrization not in PARAMETRIZATIONS:
        raise ConversionError(
            f"parametrization: got {parametrization!r}, expected one of "
            f"{', '.join(PARAMETRIZATIONS)}"
        )
    numbers = _layer_numbers(config, counts.pop(), options, folder / CONFIG)
    tensors = {names[name]: tensor for name, tensor in stack.items()}
    if "X" in tensors:
        if (
            tensors["X"].shape[-2] != width
            or tensors["signs"].shape != tensors["X"].shape[:-2] + tensors["X"].shape[-1:]
        ):
            raise ConversionError(
                f"{folder / WEIGHTS}: X {tuple(tensors['X'].shape)} and signs do not belong "
                "together"
            )
        with torch.no_grad():  # one call for all layers, as in the model, for the same rounding
            tensors["write"] = build(parametrization, tensors["X"], signs=tensors["signs"])[0]
    try:
        activation = canonical_activation(config.get("activation"))
    except ValueError as error:
        raise ConversionError(str(error)) from None
    adapter = SavedAdapter(
        intervention=intervention,
        component=config.get("component", "block_output"),
        layers={
            n: [
                {k: t[i][s] if untied else t[i] for k, t in tensors.items()}
                for s in range(1 + untied)
            ]
            for i, n in enumerate(numbers)
        },
        positions=config.get("positions", "f7+l7"),
        pyreft_positions=bool(config.get("pyreft_positions", False)),
        all_layers=config.get("layers", "all") == "all",
        activation=activation,
        dropout=float(config.get("dropout", 0.0)),
        parametrization=parametrization,
        base_model=config.get("base_model_name_or_path"),
        details={NAME: {k: config[k] for k in _PEFT_SETTINGS if k in config}},
    )
    if other:
        adapter.notes.append(f"left out {len(other)} tensors of trained modules (modules_to_save)")
    return adapter


def _free_parameters(layer: int, weights: Weights, parametrization: str) -> tuple[Tensor, Tensor]:
    """Return X and signs in fp32: those of the source, else computed from R in fp64."""
    if "X" in weights:
        return weights["X"].float(), weights["signs"].float()
    try:
        X, signs = INVERSES[parametrization](weights["write"])  # computed in fp64
    except ValueError as error:
        raise ConversionError(f"layer {layer}: {error}") from None
    return X.float(), signs.float()


def write(adapter: SavedAdapter, folder: Path, options: Options) -> None:
    """Write the adapter to a folder. Requires PEFT.

    Raises:
        ConversionError: If the positions are unknown, R is not orthonormal, b2 cannot be folded,
            a setting is invalid, or PEFT is not installed.
    """
    required_positions(adapter)
    kind = adapter.kind
    rows: dict[str, list[Tensor]] = {name: [] for name in _names(kind)}
    for layer, sets in adapter.layers.items():
        stored_sets = []
        for weights in sets:
            stored: Weights = {
                "bias": cast(fold_subtract_bias(adapter, weights, "our PEFT folder"), options.dtype)
            }
            if kind.orthonormal:
                stored["X"], stored["signs"] = _free_parameters(
                    layer, weights, adapter.parametrization
                )
            else:
                stored["write"] = cast(weights["write"], options.dtype)
            if kind.reads:
                stored["read"] = cast(weights["read"], options.dtype)
            stored_sets.append(stored)
        for name, common_name in _names(kind).items():
            parts = [s[common_name] for s in stored_sets]
            rows[name].append(torch.stack(parts) if adapter.untied else parts[0])
    prefix = f"base_model.model.representation_edits.d{adapter.embed_dim}.reft_stack."
    _configuration(adapter, options).save_pretrained(folder)
    write_safetensors(
        folder / WEIGHTS,
        {prefix + name: torch.stack(t) for name, t in rows.items()},
        {"format": "pt"},
    )


def _configuration(adapter: SavedAdapter, options: Options) -> Any:
    try:
        from reft_kernels.integrations.peft import ReftConfig
    except ImportError as error:
        raise ConversionError(
            f"peft: is needed to write its configuration, and cannot be imported: {error}"
        ) from None
    known = {field.name for field in dataclasses.fields(ReftConfig)}
    settings = {k: v for k, v in adapter.details.get(NAME, {}).items() if k in known}
    try:
        return ReftConfig(
            **{
                "init": None,  # not used, since the weights are loaded
                **settings,
                "base_model_name_or_path": options.base_model or adapter.base_model,
                "inference_mode": True,
                "layers": "all"
                if adapter.all_layers and adapter.component in ROLES
                else list(adapter.layers),
                "rank": adapter.rank,
                "positions": adapter.positions,
                "pyreft_positions": adapter.pyreft_positions,
                "share_weights": not adapter.untied,
                "intervention": adapter.intervention,
                "component": adapter.component,
                "activation": adapter.activation,
                "dropout": adapter.dropout,
                "parametrization": adapter.parametrization,
            }
        )
    except (TypeError, ValueError) as error:
        raise ConversionError(str(error)) from None
