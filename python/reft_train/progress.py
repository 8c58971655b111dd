"""Progress bar of long loops."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(total: int, title: str, unit: str = "step", show: bool = True) -> tqdm:
    """Create a progress bar on stderr; without a terminal it is printed every ten seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=f"{title:<26}",
        unit=unit,
        mininterval=interval,
        maxinterval=interval,
        disable=not show,
    )
