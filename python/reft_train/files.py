"""Atomic writes: a reader sees the old file or folder or the new one, never a half of either."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from reft_train.errors import UserError


def write_bytes(path: Path, content: bytes) -> Path:
    """Write ``content`` beside ``path`` and move it there; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from others
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, content: str) -> Path:
    """As :func:`write_bytes`, in UTF-8."""
    return write_bytes(path, content.encode("utf-8"))


def replace_folder(source: Path, target: Path) -> Path:
    """Make ``source``, on the same file system, the folder at ``target``; an old one goes once
    the new one is there.
    """
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


def check_folder(folder: Path, name: str) -> Path:
    """Refuse an output folder that is a file or cannot be written to.

    Args:
        name: the argument that errors name.

    Returns:
        The deepest folder on the way that is there.

    Raises:
        UserError: naming what stands in the way.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{name}: got {folder}, but {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(
            f"{name}: got {folder}, but {existing} cannot be written to, expected a folder that can"
        )
    return existing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
