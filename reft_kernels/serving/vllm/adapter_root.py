"""The directory from which clients may load adapters."""

from __future__ import annotations

from pathlib import Path


def folder_in(root: Path, name: object) -> Path:
    """Return the adapter folder of a name that a client sent.

    Args:
        root: the directory of the operator.
        name: the name of a folder in it, without separators.

    Returns:
        The folder's real path.

    Raises:
        ValueError: ``name`` is no plain name, or a link leads out of ``root``.
        FileNotFoundError: ``root`` has no such folder.
    """
    if not isinstance(name, str) or not name or len(name) > 255 or not name.isprintable():
        raise ValueError(f"path: got {name!r}, expected the name of a folder in the adapter root")
    if name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(
            f"path: got {name!r}, expected the name of a folder in the adapter root, without "
            "separators or a leading '.'"
        )
    base = root.resolve()
    folder = (base / name).resolve()
    if not folder.is_relative_to(base) or folder == base:
        raise ValueError(f"path: got {name!r}, a link out of the adapter root")
    if not folder.is_dir():
        raise FileNotFoundError(f"path: got {name!r}, which is no folder in the adapter root")
    for file in folder.rglob("*"):
        if not file.resolve().is_relative_to(base):
            raise ValueError(
                f"path: got {name!r}, whose {file.relative_to(folder)} is a link out of the "
                "adapter root"
            )
    return folder
