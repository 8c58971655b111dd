"""The suites, in the order of their numbers.

A module has ``TITLE``, ``ABOUT`` and ``cases(settings)``, or ``measure(settings)`` where samples
need processes of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

from benchmarks import harness
from benchmarks.rows import Row

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
    """The module of a suite.

    Raises:
        ValueError: no such suite.
    """
    if name not in NAMES:
        raise ValueError(f"suite: got {name!r}, expected one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.suites.{name}")


def answers(name: str, settings: harness.Settings) -> Iterator[list[Row]]:
    """Measure a suite: the rows of one case after the other."""
    suite = load(name)
    if hasattr(suite, "measure"):
        yield from suite.measure(settings)
        return
    for case in suite.cases(settings):
        if settings.wants(case):
            yield harness.measure(case, settings)
