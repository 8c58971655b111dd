"""The benchmark suites, in display order.

Each module has ``TITLE``, ``ABOUT`` and ``cases(settings)``, or ``measure(settings)`` where the
samples need subprocesses.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

from benchmarks import harness
from benchmarks.protocol import RunSettings
from benchmarks.rows import Measurement

NAMES = (
    "edit_all_rows",
    "edit_selected_rows",
    "r_build",
    "training_step",
    "generation",
    "host_cost",
    "cold_start",
    "trainer_step",
    "packing",
)


def load(name: str) -> ModuleType:
    """Return the module of a suite.

    Raises:
        ValueError: If there is no such suite.
    """
    if name not in NAMES:
        raise ValueError(f"suite: got {name!r}, expected one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.suites.{name}")


def measure(name: str, settings: RunSettings) -> Iterator[list[Measurement]]:
    """Measure a suite and yield the rows of each case."""
    suite = load(name)
    if hasattr(suite, "measure"):
        yield from suite.measure(settings)
        return
    for case in suite.cases(settings):
        if settings.wants(case):
            yield harness.measure(case, settings)
