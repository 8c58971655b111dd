"""Memory figures from Linux's /proc."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")


def sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each field that the file gives in kB; empty if there is no file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {
        name: int(size) * 1024
        for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    }
