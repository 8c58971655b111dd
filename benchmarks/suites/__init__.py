"""The benchmark suites, in display order.

Each module has ``TITLE``, ``ABOUT`` and one of: ``specs(settings)``, cases that are built when they
are measured; ``cases(settings)``, cases whose inputs are small; ``measure(settings)``, where the
samples need subprocesses.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

from benchmarks import harness, stopping
from benchmarks.protocol import CaseSpec, RunSettings
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
    "peft_methods",
    "many_adapters",
)


def load(name: str) -> ModuleType:
    """Return the module of a suite.

    Raises:
        ValueError: If there is no such suite.
    """
    if name not in NAMES:
        raise ValueError(f"suite: got {name!r}, expected one of {', '.join(NAMES)}")
    return importlib.import_module(f"benchmarks.suites.{name}")


def specs(name: str, settings: RunSettings) -> list[CaseSpec]:
    """Return the cases of a suite that the settings want, in the order of ``settings.labels``.

    Raises:
        ValueError: If the suite has no case with one of the labels.
    """
    suite = load(name)
    if hasattr(suite, "specs"):
        found = list(suite.specs(settings))
    else:
        found = [
            CaseSpec(case.mode, case.shape, case.dtype, lambda case=case: case)
            for case in getattr(suite, "cases", lambda _: ())(settings)
        ]
    wanted = {spec.label: spec for spec in found if settings.wants(spec)}
    unknown = [label for label in settings.labels if label not in {spec.label for spec in found}]
    if unknown:
        raise ValueError(
            f"labels: got {unknown[0]!r}, expected cases of {name}: "
            f"{'; '.join(spec.label for spec in found)}"
        )
    return [wanted[label] for label in settings.labels or wanted if label in wanted]


def measure(name: str, settings: RunSettings) -> Iterator[list[Measurement]]:
    """Measure a suite and yield the rows of each case.

    A case that cannot be built yields one row without a time, and the suite goes on. The suite ends
    early if :mod:`benchmarks.stopping` requests it.
    """
    suite = load(name)
    if hasattr(suite, "measure"):
        yield from suite.measure(settings)
        return
    if settings.labels or hasattr(suite, "specs"):
        found: Iterable[CaseSpec] = specs(name, settings)
    else:  # one case at a time, because a case holds its inputs
        found = (
            CaseSpec(case.mode, case.shape, case.dtype, lambda case=case: case)
            for case in suite.cases(settings)
            if settings.wants(case)
        )
    for spec in found:
        if stopping.requested():
            return
        yield harness.measure_spec(name, spec, settings)
