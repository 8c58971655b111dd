"""Files of a pass: a folder per part that outlives the pass, and the archives made from it."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import time
from pathlib import Path

MOST_BYTES = 16 << 20  # of one archive: what a borrowed machine returns
KEPT_LOG_BYTES = 256 << 10  # of a log in an archive, its end


class State:
    """The state folder.

    ``PART/`` holds a part's logs and rows, ``PART/steps.json`` how its steps ended. The state
    belongs to the sources that it was made from; with other sources it is removed.

    Args:
        folder: State folder, made if it does not exist.
        sources: Digest of the sources.
        fresh: Remove an earlier state.
    """

    def __init__(self, folder: Path, sources: str, fresh: bool = False) -> None:
        self.folder = folder
        self._ends: dict[str, dict[str, str]] = {}  # known even if they cannot be written
        stamp = folder / "sources.txt"
        if folder.exists() and (
            fresh or not stamp.exists() or stamp.read_text().strip() != sources
        ):
            if any(folder.iterdir()) and not stamp.exists():
                raise FileExistsError(f"{folder} has files that no pass has written")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp.write_text(sources + "\n")

    def part(self, name: str) -> Path:
        """Return the folder of a part."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def steps(self, part: str) -> dict[str, str]:
        """Return how the steps of a part ended."""
        own = self._ends.get(part, {})
        try:
            return json.loads((self.part(part) / "steps.json").read_text()) | own
        except (OSError, json.JSONDecodeError):  # cut off while it was written
            return dict(own)

    def set_step(self, part: str, step: str, end: str) -> None:
        """Record how a step ended."""
        self._ends.setdefault(part, {})[step] = end
        file = self.part(part) / "steps.json"
        written = file.with_suffix(".tmp")
        written.write_text(json.dumps(self.steps(part) | {step: end}, indent=1) + "\n")
        os.replace(written, file)

    def archive(self, part: str, out: Path) -> Path:
        """Write the archive of a part, ``out/PART.tar.gz``: its files, of long logs the end."""
        data = _packed(self.part(part), KEPT_LOG_BYTES)
        if len(data) > MOST_BYTES:
            data = _packed(self.part(part), 4096)
        out.mkdir(parents=True, exist_ok=True)
        made = self.folder / f".{part}.tar.gz"
        target = out / f"{part}.tar.gz"
        try:
            made.write_bytes(data)
            os.replace(made, target)
        except OSError:  # another file system, or a full one
            target.write_bytes(data)
            made.unlink(missing_ok=True)
        return target


def _packed(folder: Path, most: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in sorted(folder.rglob("*")):
            if not file.is_file():
                continue
            data = file.read_bytes()
            if file.suffix == ".log" and len(data) > most:
                data = b"[the beginning is left out]\n" + data[-most:]
            entry = tarfile.TarInfo(str(Path(folder.name) / file.relative_to(folder)))
            entry.size, entry.mtime = len(data), int(time.time())
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
