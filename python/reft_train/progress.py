"""Progress bar of long loops."""

from __future__ import annotations

import sys
from typing import Any


def bar(total: int, title: str, unit: str = "step", show: bool = True) -> Any:
    """Create a tqdm bar on stderr; without a terminal it is printed every ten seconds."""
    from tqdm import tqdm

    every = 0.2 if sys.stderr.isatty() else 10.0
    options = {"unit": unit, "mininterval": every, "maxinterval": every, "disable": not show}
    return tqdm(total=total, desc=f"{title:<26}", **options)
