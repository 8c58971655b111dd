"""Linux's memory figures under /proc."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")


def sizes(path: Path) -> dict[str, int]:
    """Bytes of each field that the file gives in kB; none where there is no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {
        name: int(size) * 1024
        for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)
    }
