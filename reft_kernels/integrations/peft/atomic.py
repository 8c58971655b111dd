"""Atomic saving: after a crash, the folder contains either the old adapter or the new one.

PEFT writes weights and configuration in place, one after the other. For a model with ReFT adapters,
``PeftModel.save_pretrained`` writes to a hidden folder inside the target instead and then renames
each file to its final name, the weights first. The metadata of the safetensors file contains a copy
of the configuration and an id of the save; ``adapter_config.json`` contains the same id. If the ids
differ, the save was interrupted between the two renames, and loading uses the configuration from
the metadata.

With ``safe_serialization=False`` there is no metadata: each file is replaced atomically, but not
the pair. ``save_pretrained`` of transformers writes in place.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft.peft_model import PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from reft_kernels.adapter_files import ConversionError, read_json
from reft_kernels.integrations.peft.register import REFT

MARK = "save_id"
OWN_CONFIG = "reft_config"
SCRATCH = ".saving-"
_CARD = "README.md"
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def install() -> None:
    """Replace ``PeftModel.save_pretrained`` by the atomic version, once."""
    if not hasattr(PeftModel.save_pretrained, "reft_original"):
        PeftModel.save_pretrained = _atomic(PeftModel.save_pretrained)


def _atomic(original: Any) -> Any:
    """The atomic version of ``PeftModel.save_pretrained``."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> None:
        arguments = signature.bind(self, save_directory, *args, **kwargs).arguments
        reft = any(config.peft_type == REFT for config in self.peft_config.values())
        writes = arguments.get("is_main_process", True) and not os.path.isfile(save_directory)
        if not reft or not writes or arguments.get("path_initial_model_for_weight_conversion"):
            return original(self, save_directory, *args, **kwargs)
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=target))
        try:
            _copy_cards(target, scratch, self.peft_config)
            result = original(self, str(scratch), *args, **kwargs)
            _publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return result

    wrapper: Any = save_pretrained
    wrapper.reft_original = original
    return wrapper


def _copy_cards(target: Path, scratch: Path, names: Iterable[str]) -> None:
    """Copy the model cards to the scratch folder: PEFT extends existing cards.

    Args:
        target: the folder to save to.
        scratch: the hidden folder that PEFT writes to.
        names: adapter names, which are names of subfolders except for "default".
    """
    for folder in ("", *(name for name in names if name != "default")):
        if (target / folder / _CARD).is_file():
            (scratch / folder).mkdir(exist_ok=True)
            shutil.copyfile(target / folder / _CARD, scratch / folder / _CARD)


def _seal(folder: Path) -> None:
    """Write the id of the save to the weights and the configuration of a ReFT adapter."""
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != REFT.value:
        return
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    pickled = folder / WEIGHTS_NAME
    digest = hashlib.sha256(json.dumps({**config, MARK: None}, sort_keys=True).encode())
    digest.update((weights if weights.is_file() else pickled).read_bytes())
    config[MARK] = digest.hexdigest()[:32]
    if weights.is_file():
        entries = {MARK: config[MARK], OWN_CONFIG: json.dumps(config, sort_keys=True)}
        _add_metadata(weights, entries)
    text = json.dumps(config, indent=2, sort_keys=True)  # the format of PEFT
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _add_metadata(path: Path, entries: dict[str, str]) -> None:
    """Add entries to the ``__metadata__`` of a safetensors file.

    The file starts with the length of the header in 8 bytes and the header as JSON, padded with
    spaces to a multiple of 8; the tensors follow.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = {**header.pop("__metadata__", {}), **entries}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _publish(scratch: Path, target: Path) -> None:
    """Move all files to the target: in each folder weights, then configuration, then the rest."""
    for folder, _, names in os.walk(scratch):
        source = Path(folder)
        destination = target / source.relative_to(scratch)
        destination.mkdir(exist_ok=True)
        if CONFIG_NAME in names:
            _seal(source)
        order = sorted(names, key=lambda name: (name not in _WEIGHTS, name != CONFIG_NAME, name))
        if CONFIG_NAME in names and _has_other_method(destination):
            # weights of another method have no id, so an interruption would go unnoticed
            order.remove(CONFIG_NAME)
            order.insert(0, CONFIG_NAME)
        for name in order:
            _flush(source / name)
            os.replace(source / name, destination / name)
        _flush(destination)
        for stale in _WEIGHTS:  # PEFT would still load weights of the other format
            if CONFIG_NAME in names and stale not in names:
                (destination / stale).unlink(missing_ok=True)


def _has_other_method(folder: Path) -> bool:
    """Whether a folder contains an adapter of another method."""
    try:
        return read_json(folder / CONFIG_NAME).get("peft_type") != REFT.value
    except ConversionError:
        return False


def _flush(path: Path) -> None:
    """Flush a file or a folder's entries to disk, if the file system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def interrupted_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in the weights' metadata, if a save to the folder was interrupted.

    Args:
        folder: a local adapter folder.

    Returns:
        None if the save was complete: the ids agree, or the id in ``adapter_config.json`` is null,
        as when the user saved the configuration alone. A configuration without an id was written
        by an earlier version, so it does not belong to weights that have one.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() or not (folder / CONFIG_NAME).is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
        config = json.loads(metadata[OWN_CONFIG])
        beside = read_json(folder / CONFIG_NAME)
    except Exception:  # loading reports damaged files
        return None
    if not isinstance(config, dict) or beside.get(MARK, "") in (None, metadata.get(MARK)):
        return None
    return config
