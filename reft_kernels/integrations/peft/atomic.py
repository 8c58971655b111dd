"""Saving over an adapter that is there: a crash leaves the old adapter or the new one.

PEFT writes weights and configuration one after the other, in place. For a model with ReFT adapters,
``PeftModel.save_pretrained`` writes into a hidden folder inside the target instead, and each file
then takes its place by a rename, an adapter's weights first. The weights carry their configuration
and a mark, in the metadata of the safetensors file, and ``adapter_config.json`` carries the mark
too. Where the marks differ, the save was cut short between the two renames, and the configuration
that the weights carry is theirs: loading uses it.

Weights of ``safe_serialization=False`` have no such metadata: each of their files is whole, and no
more. transformers' own ``save_pretrained`` writes in place.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft.peft_model import PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from reft_kernels.conversion.common import ConversionError
from reft_kernels.conversion.files import read_json
from reft_kernels.integrations.peft.register import REFT

MARK = "save_id"
OWN_CONFIG = "reft_config"
SCRATCH = ".saving-"
_CARD = "README.md"
_WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)


def install() -> None:
    """Put the function below in the place of ``PeftModel.save_pretrained``, once."""
    if not hasattr(PeftModel.save_pretrained, "reft_original"):
        PeftModel.save_pretrained = _around(PeftModel.save_pretrained)


def _around(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel, save_directory: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> None:
        given = signature.bind(self, save_directory, *args, **kwargs).arguments
        reft = any(config.peft_type == REFT for config in self.peft_config.values())
        writes = given.get("is_main_process", True) and not os.path.isfile(save_directory)
        if not reft or not writes or given.get("path_initial_model_for_weight_conversion"):
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

    save_pretrained.reft_original = original
    return save_pretrained


def _copy_cards(target: Path, scratch: Path, names: Any) -> None:
    """Model cards are amended, so what is there has to be there."""
    for folder in ("", *(name for name in names if name != "default")):
        if (target / folder / _CARD).is_file():
            (scratch / folder).mkdir(exist_ok=True)
            shutil.copyfile(target / folder / _CARD, scratch / folder / _CARD)


def _seal(folder: Path) -> None:
    """Give the weights and the configuration of a ReFT adapter their common mark."""
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != REFT.value:
        return
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    other = folder / WEIGHTS_NAME
    known = hashlib.sha256(json.dumps({**config, MARK: None}, sort_keys=True).encode())
    known.update((weights if weights.is_file() else other).read_bytes())
    config[MARK] = known.hexdigest()[:32]
    if weights.is_file():
        own = {MARK: config[MARK], OWN_CONFIG: json.dumps(config, sort_keys=True)}
        _add_metadata(weights, own)
    text = json.dumps(config, indent=2, sort_keys=True)  # as PEFT writes it
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def _add_metadata(path: Path, entries: dict[str, str]) -> None:
    """Add entries to a safetensors file's header: its length in 8 bytes, JSON, then the tensors."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = {**header.pop("__metadata__", {}), **entries}
    text = json.dumps({"__metadata__": dict(sorted(metadata.items())), **header}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _publish(scratch: Path, target: Path) -> None:
    """Move every file to its place: in each folder the weights, the configuration, the rest."""
    for found, _, names in os.walk(scratch):
        source = Path(found)
        place = target / source.relative_to(scratch)
        place.mkdir(exist_ok=True)
        if CONFIG_NAME in names:
            _seal(source)
        order = sorted(names, key=lambda name: (name not in _WEIGHTS, name != CONFIG_NAME, name))
        if CONFIG_NAME in names and _of_another_method(place):
            order.remove(CONFIG_NAME)  # its weights are not ReFT's: no mark would tell
            order.insert(0, CONFIG_NAME)
        for name in order:
            _flush(source / name)
            os.replace(source / name, place / name)
        _flush(place)
        for stale in _WEIGHTS:  # PEFT would go on loading weights of the other format
            if CONFIG_NAME in names and stale not in names:
                (place / stale).unlink(missing_ok=True)


def _of_another_method(place: Path) -> bool:
    try:
        return read_json(place / CONFIG_NAME).get("peft_type") != REFT.value
    except ConversionError:
        return False


def _flush(path: Path) -> None:
    """Put a file, or a folder's names, on the disk before what follows; where the system can."""
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


def cut_short(folder: Path) -> dict[str, Any] | None:
    """The configuration that a local folder's weights carry, where another one stands beside them.

    ``adapter_config.json`` without a mark is of an earlier version; one whose mark is null was
    written by itself, as by a user, and holds.
    """
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file() or not (folder / CONFIG_NAME).is_file():
        return None
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
        own = json.loads(metadata[OWN_CONFIG])
        beside = read_json(folder / CONFIG_NAME)
    except Exception:  # damaged files are refused when they are read
        return None
    if not isinstance(own, dict) or beside.get(MARK, "") in (None, metadata.get(MARK)):
        return None
    return own
