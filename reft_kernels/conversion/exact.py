"""The file ``reft_exact.safetensors``, which makes converting back exact.

The formats store R differently. pyreft's LoReFT stores R itself. The other pyreft classes and
AdapterHub store ``original`` and ``base`` of PyTorch's parametrization, which represent any R
exactly. This package stores X and signs, with R = householder(X) or cayley(X). Converting R to X
and back changes R by rounding, because X has r (r + 1) / 2 fewer parameters than R has entries.

A converted folder therefore contains this file, which other frameworks ignore. It holds the
source's tensors that cannot be restored exactly from the folder itself, and the settings that the
folder's format cannot express. It also holds a digest of the folder's weights; if they have
changed, the file is ignored and a note is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reft_kernels.adapter_files import ConversionError, read_safetensors, write_safetensors
from reft_kernels.conversion.common import SPARE, SavedAdapter, bits, digest

FILE = "reft_exact.safetensors"
VERSION = "1"
SETTINGS = ("positions", "pyreft_positions", "activation", "dropout", "all_layers")


def _settings(adapter: SavedAdapter) -> dict[str, Any]:
    named = {name: getattr(adapter, name) for name in (*SETTINGS, "parametrization", "base_model")}
    return {**named, "details": adapter.details}


def keep(folder: Path, adapter: SavedAdapter, restored: SavedAdapter) -> None:
    """Write the file, unless the folder already represents the adapter exactly.

    Args:
        folder: The converted folder.
        adapter: The adapter that was converted.
        restored: The adapter as read from ``folder``.
    """
    tensors = restored.flat()
    lost = {
        name: tensor
        for name, tensor in adapter.flat().items()
        if name not in tensors or not torch.equal(bits(tensor), bits(tensors[name]))
    }
    settings = _settings(adapter)
    if lost or settings != _settings(restored):
        metadata = {
            "reft_kernels_exact": VERSION,
            "digest": digest(restored),
            "settings": json.dumps(settings),
        }
        write_safetensors(folder / FILE, lost, metadata)


def restore(folder: Path, adapter: SavedAdapter) -> None:
    """Restore the tensors and settings that :func:`keep` wrote, if the file exists and matches.

    Settings that the folder's format contains are not changed.

    Args:
        folder: The folder.
        adapter: The adapter as read from ``folder``, changed in place.

    Raises:
        ConversionError: If the file is corrupt or has another version.
    """
    path = folder / FILE
    if not path.exists():
        return
    tensors, metadata = read_safetensors(path)
    if metadata.get("reft_kernels_exact") != VERSION:
        raise ConversionError(
            f"{path}: version {metadata.get('reft_kernels_exact')!r}, expected {VERSION!r}"
        )
    if metadata.get("digest") != digest(adapter):
        adapter.notes.append(f"{FILE} belongs to other weights than the folder's; it is ignored")
        return
    try:
        settings = json.loads(metadata["settings"])
        for name in adapter.unheld:
            setattr(adapter, name, settings[name])
        adapter.base_model = adapter.base_model or settings["base_model"]
        adapter.details = settings["details"] | adapter.details
        if "X" not in adapter.first:
            adapter.parametrization = settings["parametrization"]
        _put(adapter, tensors)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConversionError(f"{path}: is corrupt: {type(error).__name__} {error}") from None


def _put(adapter: SavedAdapter, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        layer, label, name = key.split(".")
        sets = (
            adapter.spare.setdefault(int(layer), {})
            if label == SPARE
            else adapter.layers[int(layer)][int(label)]
        )
        sets[name] = tensor
