"""Atomic writes: a reader sees the old file or folder or the new one, never a half of either."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_train.errors import UserError


def write_bytes(path: Path, content: bytes) -> Path:
    """Write ``content`` beside ``path`` and move it there; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.umask(mask := os.umask(0))
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide the file from others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, content: str) -> Path:
    """As :func:`write_bytes`, in UTF-8."""
    return write_bytes(path, content.encode("utf-8"))


def replace_folder(source: Path, target: Path) -> Path:
    """Make ``source``, on the same file system, the folder at ``target``; an old one goes last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        os.replace(source, target)
        return target
    # a folder that is not empty cannot be replaced in one step
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.")) / "old"
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(aside, target)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
    return target


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def dumps(value: Any) -> str:
    """Indented JSON that every reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object of a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # JSON's and UTF-8's errors are ValueErrors
        reason = f"which is not readable JSON ({error})"
        raise UserError(f"{name}: got {path}, {reason}, expected an object") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise UserError(f"{name}: got {path} with a JSON {kind}, expected an object")
    return value


def check_folder(folder: Path, name: str) -> Path:
    """The deepest folder on the way to an output folder that is there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{name}: got {folder}, but {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        reason = f"but {existing} cannot be written to"
        raise UserError(f"{name}: got {folder}, {reason}, expected a folder that can")
    return existing


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/reft_train``, or ``~/.cache/reft_train``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "reft_train"
