"""Types that benchmark suites pass to the harness: cases, providers and timed calls."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor


class ProviderUnavailable(RuntimeError):
    """Raised when a provider cannot run on this machine. The message gives the reason."""


@dataclass(frozen=True)
class Call:
    """One timed call: ``run(before())``, where only ``run`` is timed.

    Attributes:
        run: Function to time. Takes the return value of ``before``.
        before: Untimed preparation of each call, such as the forward pass of a timed backward.
        capturable: Whether the call can be captured in a CUDA graph.
        repeatable: The work of ``run`` in a form that can run many times on one return value of
            ``before``, for captures. None if ``run`` can.
        countable: Whether a dispatch mode can count the call's operators. False for compiled code.
        context: Untimed context entered around ``before`` and ``run``, such as a forced backend.
        other_thread: Whether the call runs in another thread, where PyTorch's CPU profiler does
            not record its allocations.
    """

    run: Callable[[object], object]
    before: Callable[[], object] = field(default=lambda: None)
    capturable: bool = True
    repeatable: Callable[[object], object] | None = None
    countable: bool = True
    context: Callable[[], AbstractContextManager] = field(default=contextlib.nullcontext)
    other_thread: bool = False

    def once(self) -> object:
        """Run the call once, including its preparation."""
        with self.context():
            return self.run(self.before())

    def repeat(self, prepared: object) -> object:
        """Run the call on a return value of ``before`` that other calls use, too."""
        return (self.repeatable or self.run)(prepared)


@dataclass(frozen=True)
class AccuracyCheck:
    """A provider's error against an fp64 reference.

    Attributes:
        error: Largest absolute error, relative to the largest absolute reference value.
        allowed: Largest error that is accepted, on the same scale.
    """

    error: float
    allowed: float


@dataclass(frozen=True)
class Provider:
    """An implementation to measure.

    Attributes:
        prepare: Returns the call on the k-th input set. Raises :class:`ProviderUnavailable` when
            the provider cannot run on this machine.
        check: Compares the provider with an fp64 reference before it is timed.
    """

    prepare: Callable[[int], Call]
    check: Callable[[], AccuracyCheck] | None = None


@dataclass(frozen=True)
class Case:
    """One case of a suite: a mode, shape and dtype, and the providers to measure on it.

    Attributes:
        suite, mode, shape, dtype: As in :class:`benchmarks.rows.Measurement`.
        providers: Providers by name.
        baseline: Name of the provider that ratios refer to.
        sets: Number of input sets to rotate through. See :func:`benchmarks.harness.sets_for`.
        bytes: Minimum memory traffic of one call.
        clone: One tensor per input set. ``torch.clone`` of them is timed as a lower bound.
        rounds: Samples per provider, unless the run settings give a number.
    """

    suite: str
    mode: str
    shape: dict[str, object]
    dtype: torch.dtype
    providers: dict[str, Provider]
    baseline: str
    sets: int = 1
    bytes: int | None = None
    clone: list[Tensor] | None = None
    rounds: int = 15

    @property
    def label(self) -> str:
        """The shape as ``name=value`` pairs."""
        return " ".join(f"{key}={value}" for key, value in self.shape.items())


@dataclass(frozen=True)
class CaseSpec:
    """A case that is not built yet: building it draws its inputs.

    Attributes:
        mode, shape, dtype: As in :class:`Case`.
        build: Returns the case.
    """

    mode: str
    shape: dict[str, object]
    dtype: torch.dtype
    build: Callable[[], Case]

    @property
    def label(self) -> str:
        """Mode, shape and dtype, as in ``forward rows=8192 d=4096 r=8 bfloat16``."""
        return case_label(self)


def case_label(case: Case | CaseSpec) -> str:
    """Return the mode, shape and dtype of a case, separated by spaces."""
    shape = " ".join(f"{key}={value}" for key, value in case.shape.items())
    return f"{case.mode} {shape} {str(case.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class RunSettings:
    """Settings of a benchmark run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        quick: Use small shapes and few rounds.
        rounds: Samples per provider. Defaults to the number that each case sets.
        match: Measure only cases whose mode, shape and dtype contain each of these words.
        labels: Measure only the cases with these labels; suites with ``specs`` do so in this order.
            See :func:`case_label`.
        without: Leave out providers whose name contains one of these words.
        failed: Leave out these providers of a case, by the label of the case: they have broken the
            device before.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int | None = None
    match: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    failed: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def wants(self, case: Case | CaseSpec) -> bool:
        """Return whether the case's mode, shape and dtype contain every word of ``match``.

        If ``labels`` is given, the case's label must be one of them.
        """
        label = case_label(case)
        return all(word in label for word in self.match) and (
            not self.labels or label in self.labels
        )

    def providers(self, case: Case) -> dict[str, Provider]:
        """Return the providers of a case to measure; the baseline is always one of them."""
        failed = self.failed.get(case_label(case), frozenset())
        return {
            name: provider
            for name, provider in case.providers.items()
            if name not in failed
            and (name == case.baseline or not any(word in name for word in self.without))
        }

    def rounds_or(self, default: int) -> int:
        """Return ``rounds`` if given, else 3 for quick runs, else ``default``."""
        return self.rounds or (3 if self.quick else default)
