"""``reft_exact.safetensors``: what a converted folder cannot hold itself, so that the way back is
exact to the bit.

The three formats store R differently: pyreft's LoReFT as R itself, torch's parametrization
(pyreft's other classes, AdapterHub) as ``original`` and ``base`` that show any R exactly, ours as X
and signs with R = householder(X) or cayley(X). R -> X -> R is
right to rounding only, and cannot be exact: R has d r free fp32 numbers, X has d r - r (r + 1) / 2.
So a folder that was converted carries, in a file that every framework ignores, the source's tensors
whose bits reading the folder back would not
give, and the settings that the format has no place for. The file names the weights that it belongs
to by their digest: once the folder is trained on or edited, it no longer matches and is ignored,
with a note.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from reft_kernels.conversion.common import SPARE, Adapter, ConversionError, bits, digest
from reft_kernels.conversion.files import read_safetensors, write_safetensors

FILE = "reft_exact.safetensors"
VERSION = "1"
SETTINGS = ("positions", "pyreft_positions", "activation", "dropout", "all_layers")


def _settings(adapter: Adapter) -> dict[str, Any]:
    named = {name: getattr(adapter, name) for name in (*SETTINGS, "parametrization", "base_model")}
    return {**named, "details": adapter.details}


def keep(folder: Path, adapter: Adapter, back: Adapter) -> None:
    """Write into ``folder`` what ``back``, the folder as it reads by itself, lacks of
    ``adapter``; no file if nothing.
    """
    held = back.flat()
    lost = {
        name: tensor
        for name, tensor in adapter.flat().items()
        if name not in held or not torch.equal(bits(tensor), bits(held[name]))
    }
    settings, theirs = _settings(adapter), _settings(back)
    if lost or settings != theirs:
        metadata = {
            "reft_kernels_exact": VERSION,
            "digest": digest(back),
            "settings": json.dumps(settings),
        }
        write_safetensors(folder / FILE, lost, metadata)


def restore(folder: Path, adapter: Adapter) -> None:
    """Put back into ``adapter``, as read from ``folder``, what :func:`keep` wrote, if it belongs to
    these weights.

    Settings that the format holds itself are left as the folder says.

    Raises:
        ConversionError: the file is corrupt or of another version.
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


def _put(adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        layer, label, name = key.split(".")
        sets = (
            adapter.spare.setdefault(int(layer), {})
            if label == SPARE
            else adapter.layers[int(layer)][int(label)]
        )
        sets[name] = tensor
