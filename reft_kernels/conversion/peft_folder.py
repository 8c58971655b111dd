"""Our PEFT folder: ``adapter_config.json`` (``peft_type`` REFT) and ``adapter_model.safetensors``.

The weights are stacked over layers, [L, ...] or [L, 2, ...] where untied, under
``base_model.model.representation_edits.d{width}.reft_stack.``: X [.., d, r] and signs [.., r] (R is
a function of them) or W2 [.., r, d]; W or W1 [.., r, d]; b or s [.., r]. All but RED is converted;
RED has no counterpart elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.activations import canonical_activation
from reft_kernels.conversion.common import (
    Adapter,
    ConversionError,
    Options,
    Weights,
    cast,
    fold_subtract_bias,
    required_positions,
)
from reft_kernels.conversion.files import read_json, read_safetensors, write_safetensors
from reft_kernels.interventions import STACKED, Intervention
from reft_kernels.model.components import ROLES
from reft_kernels.parametrization import INVERSES, PARAMETRIZATIONS, build

NAME = "peft"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(r"^(?:base_model\.model\.)?representation_edits\.d(\d+)\.reft_stack\.(\w+)$")
_KEPT = (
    "task_type",
    "init",
    "revision",
    "response_template",
)  # settings of PEFT's own that a way back restores


def matches(folder: Path) -> bool:
    """Whether the folder is a PEFT adapter's, of whatever method."""
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def _names(kind: type[Intervention]) -> dict[str, str]:
    """The neutral name of each stored tensor."""
    names = {"X": "X", "signs": "signs"} if kind.orthonormal else {"W2": "write"}
    if not kind.reads:
        return {**names, "s": "bias"}
    return {**names, ("W" if kind.orthonormal else "W1"): "read", "b": "bias"}


def _stacks(folder: Path, options: Options) -> tuple[int, dict[str, Tensor], list[str]]:
    """The width, the stacked tensors by stored name, and the names of tensors that belong to a
    saved head.
    """
    found, _ = read_safetensors(folder / WEIGHTS)
    widths: dict[int, dict[str, Tensor]] = {}
    other = []
    for key, tensor in found.items():
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


def read(folder: Path, options: Options) -> Adapter:
    """The adapter in the folder.

    Raises:
        ConversionError: another method's, RED, several widths, trained modules besides, missing or
            misshapen tensors.
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
        with torch.no_grad():  # in one call for all layers, as the model builds it
            tensors["write"] = build(parametrization, tensors["X"], signs=tensors["signs"])[0]
    try:
        activation = canonical_activation(config.get("activation"))
    except ValueError as error:
        raise ConversionError(str(error)) from None
    adapter = Adapter(
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
        details={NAME: {k: config[k] for k in _KEPT if k in config}},
    )
    if other:
        adapter.notes.append(f"left out {len(other)} tensors of trained modules (modules_to_save)")
    return adapter


def _free_parameters(layer: int, weights: Weights, parametrization: str) -> tuple[Tensor, Tensor]:
    """X and signs in fp32: the source's own where it has them, else by inversion in fp64."""
    if "X" in weights:
        return weights["X"].float(), weights["signs"].float()
    try:
        X, signs = INVERSES[parametrization](weights["write"])  # computed in fp64
    except ValueError as error:
        raise ConversionError(f"layer {layer}: {error}") from None
    return X.float(), signs.float()


def write(adapter: Adapter, folder: Path, options: Options) -> None:
    """Write the adapter into the folder; PEFT must be installed, whose configuration class checks
    every setting.

    Raises:
        ConversionError: no positions, an R that is not orthonormal, a b2 that does not fold, PEFT
            is not installed.
    """
    required_positions(adapter)
    kind = adapter.kind
    rows: dict[str, list[Tensor]] = {name: [] for name in _names(kind)}
    for layer, sets in adapter.layers.items():
        own = []
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
            own.append(stored)
        for name, neutral in _names(kind).items():
            rows[name].append(
                torch.stack([s[neutral] for s in own]) if adapter.untied else own[0][neutral]
            )
    prefix = f"base_model.model.representation_edits.d{adapter.embed_dim}.reft_stack."
    _configuration(adapter, options).save_pretrained(folder)
    write_safetensors(
        folder / WEIGHTS,
        {prefix + name: torch.stack(t) for name, t in rows.items()},
        {"format": "pt"},
    )


def _configuration(adapter: Adapter, options: Options) -> Any:
    try:
        from reft_kernels.integrations.peft import ReftConfig
    except ImportError as error:
        raise ConversionError(
            f"peft: is needed to write its configuration, and cannot be imported: {error}"
        ) from None
    known = {field.name for field in dataclasses.fields(ReftConfig)}
    own = {k: v for k, v in adapter.details.get(NAME, {}).items() if k in known}
    try:
        return ReftConfig(
            **{
                "init": None,  # whatever the intervention has: the weights come from the file
                **own,
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
