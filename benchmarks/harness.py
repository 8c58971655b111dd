"""One protocol for every suite.

Providers are timed in turn, call by call, so that drift of a shared machine meets all of them
alike. Input sets rotate, so that data come from memory and not from the last call's cache. Each
provider is first held to fp64 on the inputs that are timed:
one that is wrong gets its error in the table instead of a time. On a GPU a call is timed by events
(host included) and, where it can be captured, inside a CUDA graph (host excluded), after the clocks
have settled under load. What is reported is the median with the 20th and 80th percentile, and the
median of the round-by-round ratios to a baseline.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine, op_metrics
from benchmarks.rows import Row

CLONE = "torch.clone"
SAMPLE_SECONDS = 0.02  # a shorter call is repeated within a sample until this long
SETTLE_SECONDS = {"cuda": 0.5, "cpu": 0.0}
WARM_UP_ROUNDS = 2
MOST_SETS = 32


class Absent(RuntimeError):
    """A provider that cannot run here; the message says why."""


@dataclass(frozen=True)
class Call:
    """What is timed: ``run(before())``, of which ``before`` is left out of the time.

    Attributes:
        run: the work; takes what ``before`` returned.
        before: untimed preparation of one call, such as the forward of a backward.
        capturable: whether a CUDA graph may hold it.
        countable: whether its operators can be counted by an eager dispatch mode (compiled code
            cannot).
        context: entered around both, untimed, such as a forced backend. elsewhere: whether it works
        in a thread of its own, where the CPU's profiler does not see its memory.
    """

    run: Callable[[object], object]
    before: Callable[[], object] = field(default=lambda: None)
    capturable: bool = True
    countable: bool = True
    context: Callable[[], AbstractContextManager] = field(default=contextlib.nullcontext)
    elsewhere: bool = False

    def once(self) -> object:
        """Run it, preparation included."""
        with self.context():
            return self.run(self.before())


@dataclass(frozen=True)
class Verdict:
    """A provider's largest error against fp64 and what is allowed, both over the largest exact
    value.
    """

    error: float
    allowed: float


@dataclass(frozen=True)
class Provider:
    """``prepare(k)`` gives the call on the k-th input set and raises :class:`Absent` where it
    cannot run here.
    """

    prepare: Callable[[int], Call]
    check: Callable[[], Verdict] | None = None


@dataclass(frozen=True)
class Case:
    """One line of a suite.

    Attributes:
        suite, mode, shape, dtype: as in :class:`benchmarks.rows.Row`.
        providers: by name.
        baseline: name of the provider that ratios refer to.
        sets: how many input sets rotate (:func:`sets_for`).
        bytes: least traffic of one call.
        clone: tensors, one an input set, whose ``torch.clone`` is timed beside the providers as the
            floor.
        rounds: samples of each provider, where the settings do not say.
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
class Settings:
    """How to measure: ``quick`` asks for small shapes and few rounds, ``match`` for cases that
    contain each of its words.
    """

    device: str = "cpu"
    quick: bool = False
    rounds: int | None = None
    match: tuple[str, ...] = ()

    def wants(self, case: Case) -> bool:
        """Whether each word of ``match`` stands in the case's mode, shape or dtype."""
        text = f"{case.mode} {case.label} {case.dtype}"
        return all(word in text for word in self.match)

    def rounds_or(self, default: int) -> int:
        """The rounds asked for, else 3 when quick, else the suite's own number."""
        return self.rounds or (3 if self.quick else default)


def sets_for(set_bytes: int, device: str) -> int:
    """How many input sets overflow the last-level cache twice, at most ``MOST_SETS``."""
    return max(1, min(MOST_SETS, -(-2 * machine.cache_bytes(device) // max(set_bytes, 1))))


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _clone_provider(tensors: list[Tensor]) -> Provider:
    return Provider(lambda k: Call(lambda _: tensors[k].clone()))


@dataclass
class _Runner:
    """A provider ready to be timed."""

    calls: list[Call]
    verdict: Verdict | None
    repeats: int = 1
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    number: int = 0

    def next(self) -> Call:
        self.number += 1
        return self.calls[self.number % len(self.calls)]


def _timed(call: Call, device: str) -> tuple[float, float]:
    """Seconds of one call, and seconds until it returned to Python."""
    with call.context():
        prepared = call.before()
        if device == "cpu":
            start = time.perf_counter()
            call.run(prepared)
            seconds = time.perf_counter() - start
            return seconds, seconds
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        start = time.perf_counter()
        call.run(prepared)
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host


def _sample(runner: _Runner, device: str) -> None:
    measured = [_timed(runner.next(), device) for _ in range(runner.repeats)]
    runner.times.append(statistics.fmean(seconds for seconds, _ in measured))
    runner.host.append(statistics.fmean(seconds for _, seconds in measured))


def _prepare(
    name: str, provider: Provider, case: Case, device: str
) -> tuple[_Runner | None, Verdict | None, str]:
    try:
        verdict = provider.check() if provider.check else None
        if verdict and not verdict.error <= verdict.allowed:
            return (
                None,
                verdict,
                f"wrong: error {verdict.error:.1e} against fp64, allowed {verdict.allowed:.1e}",
            )
        runner = _Runner([provider.prepare(k) for k in range(case.sets)], verdict)
        for call in runner.calls[:2]:
            call.once()
        synchronize(device)
    except Absent as reason:
        return None, None, f"absent: {reason}"
    except torch.OutOfMemoryError:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        return None, None, "out of memory"
    if device == "cpu":
        start = time.perf_counter()
        runner.next().once()
        runner.repeats = max(1, min(1000, int(SAMPLE_SECONDS / (time.perf_counter() - start))))
    return runner, verdict, ""


def _graphs(runners: dict[str, _Runner], rounds: int) -> None:
    """Time one call of each inside a CUDA graph that holds a call on every input set,
    interleaved.
    """
    captured: dict[str, torch.cuda.CUDAGraph] = {}
    for name, runner in runners.items():
        if not all(call.capturable for call in runner.calls):
            continue
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in runner.calls:
                    call.once()
        except RuntimeError:  # synchronises with the host, as gathers by nested lists do
            torch.cuda.synchronize()
            continue
        captured[name] = graph
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, graph in captured.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            runners[name].graph.append(begin.elapsed_time(end) / 1e3 / len(runners[name].calls))
    for runner in runners.values():
        runner.graph = runner.graph[WARM_UP_ROUNDS:]


def measure(case: Case, settings: Settings) -> list[Row]:
    """Time every provider of a case; a row for each, those without a time included.

    Raises:
        KeyError: the baseline is not among the providers.
    """
    device, rounds = settings.device, settings.rounds_or(case.rounds)
    providers = dict(case.providers)
    if case.clone is not None:
        providers = {CLONE: _clone_provider(case.clone), **providers}
    providers[case.baseline]
    runners: dict[str, _Runner] = {}
    without: dict[str, tuple[Verdict | None, str]] = {}
    for name, provider in providers.items():
        runner, verdict, note = _prepare(name, provider, case, device)
        if runner is None:
            without[name] = verdict, note
        else:
            runners[name] = runner
    settled = time.perf_counter() + SETTLE_SECONDS[device]
    warm = 0
    while runners and (warm < WARM_UP_ROUNDS or time.perf_counter() < settled):
        warm += 1
        for runner in runners.values():
            _timed(runner.next(), device)
    order = list(runners)
    for number in range(rounds):
        turn = number % max(len(order), 1)
        for name in order[turn:] + order[:turn]:
            _sample(runners[name], device)
    if device == "cuda":
        _graphs(runners, rounds)
    return [
        _row(case, settings, rounds, name, runners, without.get(name, (None, "")))
        for name in providers
    ]


def _quantile(values: list[float], share: float) -> float:
    """Linear interpolation between the sorted samples."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


_STARTED = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _row(
    case: Case,
    settings: Settings,
    rounds: int,
    name: str,
    runners: dict[str, _Runner],
    without: tuple[Verdict | None, str],
) -> Row:
    device, runner = settings.device, runners.get(name)
    verdict, note = (runner.verdict, "") if runner else without
    copied = 2 * case.clone[0].nbytes if case.clone is not None else None
    moved = copied if name == CLONE else case.bytes
    found: dict[str, float | int | None] = {}
    if runner:
        clone = runners.get(CLONE)
        if clone and moved and copied:
            pairs = zip(runner.graph or runner.times, clone.graph or clone.times, strict=True)
            found["clone_fraction"] = statistics.median(
                (moved / own) / (copied / copy) for own, copy in pairs
            )
        if runner.graph:
            found["graph_ms"] = statistics.median(runner.graph) * 1e3
        if device == "cuda":
            found["host_us"] = statistics.median(runner.host) * 1e6
        if all(call.countable for call in runner.calls) or device == "cuda":
            found["launches"] = op_metrics.launches(runner.next(), device)
        if device == "cuda" or not any(call.elsewhere for call in runner.calls):
            found["peak_bytes"] = op_metrics.peak_bytes(runner.next(), device)
    if verdict:
        found |= {"error": verdict.error, "allowed": verdict.allowed}
    base = runners[case.baseline].times if case.baseline in runners else []
    return _of_times(
        case,
        settings,
        name,
        runner.times if runner else [],
        base,
        rounds,
        bytes=moved,
        note=note,
        **found,
    )


_EMPTY = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio",
    "bytes",
    "clone_fraction",
    "graph_ms",
    "launches",
    "host_us",
    "peak_bytes",
    "error",
    "allowed",
)


def _of_times(
    case: Case,
    settings: Settings,
    name: str,
    times: list[float],
    base: list[float],
    rounds: int,
    **found: object,
) -> Row:
    device = settings.device
    values: dict[str, object] = dict.fromkeys(_EMPTY) | {"note": ""} | found
    if times:
        values["median_ms"] = statistics.median(times) * 1e3
        values["p20_ms"], values["p80_ms"] = (_quantile(times, share) * 1e3 for share in (0.2, 0.8))
        if base:
            values["ratio"] = statistics.median(
                own / other for own, other in zip(times, base, strict=True)
            )
    return Row(
        suite=case.suite,
        provider=name,
        mode=case.mode,
        shape=case.label,
        dtype=str(case.dtype).removeprefix("torch."),
        device=machine.device_name(device),
        driver=machine.driver(device),
        allocator=machine.allocator(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=machine.version("triton"),
        transformers=machine.version("transformers"),
        commit=machine.commit(),
        when=_STARTED,
        rounds=rounds,
        baseline=case.baseline,
        **values,
    )


def rows_of_samples(
    case: Case, settings: Settings, samples: dict[str, list[float]], notes: dict[str, str]
) -> list[Row]:
    """Rows of what was timed elsewhere, such as in processes of their own: seconds, one sample a
    round; notes where none.
    """
    base = samples.get(case.baseline, [])
    timed = [
        _of_times(case, settings, name, times, base, len(times)) for name, times in samples.items()
    ]
    return timed + [
        _of_times(case, settings, name, [], [], 0, note=note) for name, note in notes.items()
    ]


def show(rows: Iterable[Row]) -> None:
    """Print the rows of a case as a table."""
    rows = list(rows)
    width = max(len(row.provider) for row in rows)
    first = rows[0]
    print(f"{first.suite}, {first.mode}: {first.shape}, {first.dtype}; ratio to {first.baseline}")
    for row in rows:
        if row.median_ms is None:
            print(f"  {row.provider:<{width}}  {row.note}")
            continue
        spread = f"(p20 {row.p20_ms:.4g}, p80 {row.p80_ms:.4g})"
        parts = [
            f"{row.median_ms:10.4g} ms {spread:<28}",
            f"x {row.ratio:<8.4g}" if row.ratio else "",
        ]
        if row.clone_fraction is not None:
            parts.append(f"{row.clone_fraction:.0%} of clone")
        if row.graph_ms is not None:
            parts.append(f"graph {row.graph_ms:.4g} ms")
        if row.host_us is not None:
            parts.append(f"host {row.host_us:.3g} us")
        if row.launches is not None:
            parts.append(f"{row.launches} launches")
        if row.peak_bytes is not None:
            parts.append(f"peak {row.peak_bytes / 2**20:.1f} MiB")
        print(f"  {row.provider:<{width}}  " + "  ".join(part for part in parts if part))
