"""Measure the providers of a case and return one row per provider.

Providers are timed in turn, call by call, so that drift of a shared machine affects all of them
equally. Calls rotate through several input sets, so that inputs are read from memory and not
from the cache of the previous call. Before timing, each provider is compared with an fp64
reference on the timed inputs; the row of an incorrect provider has its error and no time. A
provider that raises an exception ends with its message in its row, and the others go on. On a
GPU, calls are timed with events after the clocks have settled, which includes host time, and,
where the call can be captured, inside a CUDA graph, which excludes it. Rows report the median,
the 20th and 80th percentiles, and the median of the per-round ratios to a baseline.
"""

from __future__ import annotations

import datetime
import gc
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine, op_metrics, stopping
from benchmarks.graphs import CallGraph
from benchmarks.protocol import (
    AccuracyCheck,
    Call,
    Case,
    CaseSpec,
    Provider,
    ProviderUnavailable,
    RunSettings,
)
from benchmarks.rows import Measurement

CLONE = "torch.clone"
SAMPLE_SECONDS = 0.02  # shorter calls are repeated until a sample takes this long
SETTLE_SECONDS = {"cuda": 0.5, "cpu": 0.0}
WARM_UP_ROUNDS = 2
# a rotation touches this many times the last-level cache; a GPU's does not evict in strict order
CACHES = {"cuda": 4, "cpu": 2}
MOST_SETS = {"cuda": 256, "cpu": 32}
MEMORY_SHARE = 0.25  # of a GPU's memory, for the input sets of a case
CUT_OFF = "not measured: "
FAILED = "failed: "
NO_CASE = "all providers"  # in the row of a case that cannot be built


def sets_for(touched: int, device: str, held: int | None = None) -> int:
    """Return how many input sets to rotate through.

    Args:
        touched: Bytes of distinct memory that one call reads or writes, outputs included.
        device: Device of the inputs.
        held: Bytes of memory that an input set holds. Defaults to ``touched``.
    """
    wanted = -(-CACHES[device] * machine.cache_bytes(device) // max(touched, 1))
    most = MOST_SETS[device]
    if device == "cuda":
        memory = int(MEMORY_SHARE * machine.memory_bytes(device))
        most = min(most, memory // max(touched if held is None else held, 1))
    return max(1, min(most, wanted))


def synchronize(device: str) -> None:
    """Wait for all kernels on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _clone_provider(tensors: list[Tensor]) -> Provider:
    return Provider(lambda k: Call(lambda _: tensors[k].clone()))


@dataclass
class _Runner:
    """A provider that is ready to be timed."""

    calls: list[Call]
    verdict: AccuracyCheck | None
    repeats: int = 1
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)
    number: int = 0
    note: str = ""

    def next(self) -> Call:
        self.number += 1
        return self.calls[self.number % len(self.calls)]


class _Runners:
    """The providers of a case: those that are timed, and why the others are not."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.timed: dict[str, _Runner] = {}
        self.without: dict[str, tuple[AccuracyCheck | None, str]] = {}

    def attempt(self, name: str, work: Callable[[], object]) -> bool:
        """Run ``work`` for a provider. An exception ends the provider, not the case."""
        try:
            work()
            return True
        except Exception as error:
            runner = self.timed.pop(name, None)
            self.without[name] = runner.verdict if runner else None, _reason(error)
            if isinstance(error, torch.OutOfMemoryError):
                _free(self.device)
            else:
                _check_device(self.device, error)
            return False


def _reason(error: Exception) -> str:
    if isinstance(error, ProviderUnavailable):
        return f"absent: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{FAILED}{type(error).__name__}: {lines[0][:160]}".removesuffix(": ")


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _check_device(device: str, error: Exception) -> None:
    """Request the end of the run if the device does not work after an error."""
    if isinstance(error, ProviderUnavailable):
        return
    try:
        synchronize(device)
    except Exception as lost:  # for example an illegal memory access, which stays
        stopping.device_failed(lost)


def _timed(call: Call, device: str, kept: deque[object] | None = None) -> tuple[float, float]:
    """Return the seconds of one call, and the seconds until it returned to Python.

    The result is appended to ``kept``, so that the next call writes to other memory.
    """
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
        result = call.run(prepared)
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        if kept is not None:
            kept.append(result)
        return begin.elapsed_time(end) / 1e3, host


def _sample(runner: _Runner, device: str, kept: deque[object]) -> None:
    measured = [_timed(runner.next(), device, kept) for _ in range(runner.repeats)]
    runner.times.append(statistics.fmean(seconds for seconds, _ in measured))
    runner.host.append(statistics.fmean(seconds for _, seconds in measured))


def _prepare(runners: _Runners, name: str, provider: Provider, case: Case) -> None:
    """Check a provider and make its calls, or note why it is not timed."""
    device = runners.device

    def work() -> None:
        verdict = provider.check() if provider.check else None
        if verdict and not verdict.error <= verdict.allowed:
            note = f"wrong: error {verdict.error:.1e} against fp64, allowed {verdict.allowed:.1e}"
            runners.without[name] = verdict, note
            return
        runner = _Runner([provider.prepare(k) for k in range(case.sets)], verdict)
        for call in runner.calls[:2]:
            call.once()
        synchronize(device)
        if device == "cpu":
            start = time.perf_counter()
            runner.next().once()
            seconds = time.perf_counter() - start
            runner.repeats = max(1, min(1000, int(SAMPLE_SECONDS / seconds)))
        runners.timed[name] = runner

    runners.attempt(name, work)


def _rounds(runners: _Runners, rounds: int) -> None:
    """Time the providers in turn. Ends after a whole round if the end of the run is requested."""
    device = runners.device
    settled = time.perf_counter() + SETTLE_SECONDS[device]
    kept: deque[object] = deque(maxlen=2)
    warm = 0
    while runners.timed and (warm < WARM_UP_ROUNDS or time.perf_counter() < settled):
        warm += 1
        for name, runner in list(runners.timed.items()):
            runners.attempt(name, lambda runner=runner: _timed(runner.next(), device, kept))
    order = list(runners.timed)
    for number in range(rounds):
        if number and stopping.requested():
            break
        turn = number % max(len(order), 1)
        for name in order[turn:] + order[:turn]:
            runner = runners.timed.get(name)
            if runner and stopping.device_works():
                runners.attempt(name, lambda runner=runner: _sample(runner, device, kept))
    complete = min((len(runner.times) for runner in runners.timed.values()), default=0)
    for runner in runners.timed.values():
        del runner.times[complete:], runner.host[complete:]


def _graph_rounds(runners: _Runners, rounds: int) -> None:
    """Time each provider's calls inside a CUDA graph, in turn.

    A provider that cannot be captured keeps its other times, with the reason as its note.
    """
    captured: dict[str, CallGraph] = {}
    for name, runner in runners.timed.items():
        if not stopping.device_works() or not all(call.capturable for call in runner.calls):
            continue
        try:
            captured[name] = CallGraph(runner.calls)
        except Exception as error:
            runner.note = f"no graph: {_reason(error).removeprefix(FAILED)}"
            _free(runners.device)
            _check_device(runners.device, error)
    for number in range(WARM_UP_ROUNDS + rounds):
        if number > WARM_UP_ROUNDS and stopping.requested():
            break
        for name, graph in list(captured.items()):
            try:
                runners.timed[name].graph.append(graph.seconds())
            except Exception as error:
                del captured[name]
                runners.timed[name].graph.clear()
                runners.timed[name].note = f"no graph: {_reason(error).removeprefix(FAILED)}"
                _check_device(runners.device, error)
    complete = min((len(runners.timed[name].graph) for name in captured), default=0)
    for runner in runners.timed.values():
        runner.graph = runner.graph[WARM_UP_ROUNDS:complete]


def measure(case: Case, settings: RunSettings) -> list[Measurement]:
    """Time every provider of a case.

    If :mod:`benchmarks.stopping` requests the end of the run, providers that are not ready are left
    out, and the others have the rounds that were measured by then.

    Returns:
        One row per provider, including providers without a time.

    Raises:
        KeyError: If the baseline is not among the providers.
    """
    device, rounds = settings.device, settings.rounds_or(case.rounds)
    case.providers[case.baseline]
    providers = settings.providers(case)
    if case.clone is not None:
        providers = {CLONE: _clone_provider(case.clone), **providers}
    runners = _Runners(device)
    for name, provider in providers.items():
        if stopping.requested():
            runners.without[name] = None, CUT_OFF + stopping.requested()
        else:
            _prepare(runners, name, provider, case)
    if stopping.device_works():
        _rounds(runners, rounds)
    if device == "cuda" and stopping.device_works():
        _graph_rounds(runners, rounds)
    return [_row(case, settings, name, runners) for name in providers]


def measure_spec(suite: str, spec: CaseSpec, settings: RunSettings) -> list[Measurement]:
    """Build a case and measure it. A case that cannot be built yields one row with the reason."""
    try:
        case = spec.build()
    except Exception as error:
        _check_device(settings.device, error)
        case = Case(suite, spec.mode, spec.shape, spec.dtype, {}, NO_CASE)
        return [_of_times(case, settings, NO_CASE, [], [], 0, note=_reason(error))]
    try:
        return measure(case, settings)
    finally:
        del case
        _free(settings.device)


def _quantile(values: list[float], share: float) -> float:
    """Interpolate linearly between the sorted samples."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


_STARTED = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _row(case: Case, settings: RunSettings, name: str, runners: _Runners) -> Measurement:
    device, runner = settings.device, runners.timed.get(name)
    verdict, note = (runner.verdict, runner.note) if runner else runners.without[name]
    copied = 2 * case.clone[0].nbytes if case.clone is not None else None
    moved = copied if name == CLONE else case.bytes
    metrics: dict[str, float | int | None] = {}
    if runner and not runner.times:
        note = CUT_OFF + (stopping.requested() or "no round was completed")
    elif runner:
        clone = runners.timed.get(CLONE)
        if clone and moved and copied:
            captured = bool(runner.graph and clone.graph)
            pairs = zip(*((r.graph if captured else r.times) for r in (runner, clone)), strict=True)
            metrics["clone_fraction"] = statistics.median(
                (moved / seconds) / (copied / clone_seconds) for seconds, clone_seconds in pairs
            )
        if runner.graph:
            metrics["graph_ms"] = statistics.median(runner.graph) * 1e3
        if device == "cuda":
            metrics["host_us"] = statistics.median(runner.host) * 1e6
        metrics |= _op_metrics(runner, device)
        note = runner.note
    if verdict:
        metrics |= {"error": verdict.error, "allowed": verdict.allowed}
    base = runners.timed[case.baseline].times if case.baseline in runners.timed else []
    times = runner.times if runner else []
    return _of_times(
        case, settings, name, times, base, len(times), bytes=moved, note=note, **metrics
    )


def _op_metrics(runner: _Runner, device: str) -> dict[str, float | int | None]:
    """Return the launches and the peak memory of a call, where they can be measured."""
    metrics: dict[str, float | int | None] = {}
    if device == "cuda" and stopping.requested():  # the profiler takes seconds
        return metrics
    try:
        if all(call.countable for call in runner.calls) or device == "cuda":
            metrics["launches"] = op_metrics.launches(runner.next(), device)
        if device == "cuda" or not any(call.other_thread for call in runner.calls):
            metrics["peak_bytes"] = op_metrics.peak_bytes(runner.next(), device)
    except Exception as error:
        runner.note = runner.note or f"no launches or memory: {_reason(error)}"
        _check_device(device, error)
    return metrics


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
    settings: RunSettings,
    name: str,
    times: list[float],
    base: list[float],
    rounds: int,
    **metrics: object,
) -> Measurement:
    device = settings.device
    values: dict[str, object] = dict.fromkeys(_EMPTY) | {"note": ""} | metrics
    if times:
        values["median_ms"] = statistics.median(times) * 1e3
        values["p20_ms"], values["p80_ms"] = (_quantile(times, share) * 1e3 for share in (0.2, 0.8))
        if len(base) == len(times):
            values["ratio"] = statistics.median(
                seconds / base_seconds for seconds, base_seconds in zip(times, base, strict=True)
            )
    return Measurement(
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
    case: Case, settings: RunSettings, samples: dict[str, list[float]], notes: dict[str, str]
) -> list[Measurement]:
    """Return rows for samples that were taken elsewhere, such as in subprocesses.

    Args:
        case: Case that the samples belong to.
        settings: Settings of the run.
        samples: Seconds by provider, one sample per round.
        notes: Reason by provider, for providers without samples.
    """
    base = samples.get(case.baseline, [])
    timed = [
        _of_times(case, settings, name, times, base, len(times)) for name, times in samples.items()
    ]
    return timed + [
        _of_times(case, settings, name, [], [], 0, note=note) for name, note in notes.items()
    ]


def show(rows: Iterable[Measurement]) -> None:
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
        if row.note:
            parts.append(f"({row.note})")
        print(f"  {row.provider:<{width}}  " + "  ".join(part for part in parts if part))
