"""Reading and writing files safely: tensors without code, clear errors, and folders that appear
whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_kernels.conversion.common import ConversionError


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConversionError: not readable, not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON: {_first_line(error)}") from None
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: got a JSON {type(found).__name__}, expected an object")
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked(path: Path, found: object) -> dict[str, Tensor]:
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ConversionError(
            f"{path}: expected a state dict, names to tensors; this file holds something else"
        )
    return {str(k): t.detach() for k, t in found.items()}


def read_bin(path: Path) -> dict[str, Tensor]:
    """A state dict saved by ``torch.save``, loaded with ``weights_only=True`` on the CPU: nothing
    in the file is executed.

    Raises:
        ConversionError: missing, truncated, corrupt, or holding something other than tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors have no common base
        raise ConversionError(
            f"{path}: cannot be loaded as a state dict (weights only): {_first_line(error)}"
        ) from None
    return _checked(path, found)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        ConversionError: missing, truncated or corrupt.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dictionary)
    except Exception as error:  # the library's own error is no OSError
        raise ConversionError(
            f"{path}: cannot be loaded as safetensors: {_first_line(error)}"
        ) from None
    return found, metadata


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().contiguous().clone() for name, t in tensors.items()},
        path,
        metadata=metadata,
    )


def check_target(target: Path, force: bool) -> None:
    """Raise unless ``target`` is absent, an empty folder, or a folder that may be replaced.

    Raises:
        ConversionError: it is something else.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConversionError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConversionError(f"{target}: is not empty; --force replaces it")


@contextlib.contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """A folder beside ``target`` to write into, which takes its place when the block ends well and
    vanishes when it does not.

    What was there stays until the new folder is complete, and comes back if the last rename fails.

    Raises:
        ConversionError: as :func:`check_target`.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)  # mkdtemp's folders are their owner's alone
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    old = aside / target.name
    target.rename(old)
    try:
        scratch.rename(target)
    except OSError:
        old.rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
