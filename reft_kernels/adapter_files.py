"""Reading and writing of files.

Loading a file executes no code from it, and folders are replaced atomically.
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


class ConversionError(ValueError):
    """Raised if an adapter cannot be converted.

    The message is one line with the file or setting, its value and what was expected.
    """


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: If the file cannot be read, is not JSON or is not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read as JSON: {_first_line(error)}") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ConversionError(
            f"{path}: expected a state dict, names to tensors; this file holds something else"
        )
    return {str(k): t.detach() for k, t in content.items()}


def read_bin(path: Path) -> dict[str, Tensor]:
    """Read a state dict saved by ``torch.save``, with ``weights_only=True``, to the CPU.

    Raises:
        ConversionError: If the file cannot be loaded or contains something other than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and storage errors have no common base class
        raise ConversionError(
            f"{path}: cannot be loaded as a state dict (weights only): {_first_line(error)}"
        ) from None
    return _checked(path, content)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        ConversionError: If the file cannot be loaded.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dictionary)
    except Exception as error:  # SafetensorError is not an OSError
        raise ConversionError(
            f"{path}: cannot be loaded as safetensors: {_first_line(error)}"
        ) from None
    return tensors, metadata


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to a safetensors file."""
    from safetensors.torch import save_file

    save_file(
        {name: t.detach().contiguous().clone() for name, t in tensors.items()},
        path,
        metadata=metadata,
    )


def check_target(target: Path, force: bool) -> None:
    """Check that a folder can be written at ``target``.

    Raises:
        ConversionError: If ``target`` exists and is not a folder, or is a folder that is not empty
            and ``force`` is false.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConversionError(f"{target}: exists and is not a folder")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise ConversionError(f"{target}: is not empty; --force replaces it")


@contextlib.contextmanager
def new_folder(target: Path, force: bool) -> Iterator[Path]:
    """Context manager that writes a folder atomically.

    It yields a temporary folder next to ``target``. If the block succeeds, that folder replaces
    ``target``; otherwise it is deleted and ``target`` is unchanged.

    Raises:
        ConversionError: As in :func:`check_target`.
    """
    target = Path(os.path.abspath(target))
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)  # mkdtemp gives access to the owner only
        _swap(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(scratch: Path, target: Path) -> None:
    """Rename ``scratch`` to ``target``; if that fails, restore the previous ``target``."""
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
