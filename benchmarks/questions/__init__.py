"""The questions, in the order of their numbers.

A module has ``TITLE``, ``ABOUT`` and ``cases(settings)``, or ``measure(settings)`` where samples need processes of their own.
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
    """The module of a question.

    Raises:
        ValueError: no such question.
    """
    if name not in NAMES:
        raise ValueError(f"question: got {name!r}, expected one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.questions.{name}")


def answers(name: str, settings: harness.Settings) -> Iterator[list[Row]]:
    """Measure a question: the rows of one case after the other."""
    question = load(name)
    if hasattr(question, "measure"):
        yield from question.measure(settings)
        return
    for case in question.cases(settings):
        if settings.wants(case):
            yield harness.measure(case, settings)
