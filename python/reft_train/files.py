"""Atomic writes: readers see either the old or the new file or folder, never a partial one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from reft_train.errors import one_line, wrong

Kind = TypeVar("Kind")


def write_bytes(path: Path, content: bytes) -> Path:
    """Write ``content`` to a temporary file and rename it to ``path``. Creates parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_text(path: Path, content: str) -> Path:
    """Write text in UTF-8; see :func:`write_bytes`."""
    return write_bytes(path, content.encode("utf-8"))


def replace_folder(source: Path, target: Path) -> Path:
    """Move the folder ``source`` to ``target`` on the same file system, replacing an old folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        # a non-empty folder cannot be replaced in a single rename
        old = Path(aside) / "old"
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(source, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise
    return target


def dumps(value: Any) -> str:
    """Serialize ``value`` as indented standard JSON; non-finite numbers become null."""
    from pydantic_core import to_json

    return to_json(value, indent=1, inf_nan_mode="null").decode()


def read_json(path: Path, kind: type[Kind], name: str) -> Kind:
    """Read a value of a type that pydantic can validate from a JSON file."""
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise wrong(
            name, f"{path}, which cannot be read ({one_line(error)})", "a whole JSON file"
        ) from None


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError if a folder cannot be written, or made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise wrong(name, f"{folder}, but {existing} is a file", "a folder")
    if not os.access(existing, os.W_OK):
        raise wrong(name, f"{folder}, but {existing} is not writable", "a writable folder")


def check_own_folder(folder: Path, marks: Sequence[str]) -> None:
    """Raise UserError if an output folder holds other files but none of ``marks``."""
    check_folder(folder, "output")
    own = any((folder / name).exists() for name in marks)
    if folder.exists() and any(folder.iterdir()) and not own:
        raise wrong("output", f"{folder}, which contains other files", "a new folder")
