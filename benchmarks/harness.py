"""Measure the providers of a case and return one row per provider.

Providers are timed in turn, call by call, so that drift of a shared machine affects all of them
equally. Calls rotate through several input sets, so that inputs are read from memory and not
from the cache of the previous call. Before timing, each provider is compared with an fp64
reference on the timed inputs; the row of an incorrect provider has its error and no time. On a
GPU, calls are timed with events after the clocks have settled, which includes host time, and,
where the call can be captured, inside a CUDA graph, which excludes it. Rows report the median,
the 20th and 80th percentiles, and the median of the per-round ratios to a baseline.
"""

from __future__ import annotations

import datetime
import gc
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine, op_metrics
from benchmarks.protocol import (
    AccuracyCheck,
    Call,
    Case,
    Provider,
    ProviderUnavailable,
    RunSettings,
)
from benchmarks.rows import Measurement

CLONE = "torch.clone"
SAMPLE_SECONDS = 0.02  # shorter calls are repeated until a sample takes this long
SETTLE_SECONDS = {"cuda": 0.5, "cpu": 0.0}
WARM_UP_ROUNDS = 2
MOST_SETS = 32


def sets_for(set_bytes: int, device: str) -> int:
    """Return how many input sets exceed twice the last-level cache, at most ``MOST_SETS``."""
    return max(1, min(MOST_SETS, -(-2 * machine.cache_bytes(device) // max(set_bytes, 1))))


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

    def next(self) -> Call:
        self.number += 1
        return self.calls[self.number % len(self.calls)]


def _timed(call: Call, device: str) -> tuple[float, float]:
    """Return the seconds of one call, and the seconds until it returned to Python."""
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
) -> tuple[_Runner | None, AccuracyCheck | None, str]:
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
    except ProviderUnavailable as reason:
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
    """Time each runner's calls inside a CUDA graph, interleaved.

    A graph holds one call per input set. Runners whose calls cannot be captured are skipped.
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
        except RuntimeError:  # the call synchronizes with the host, which a capture does not allow
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


def measure(case: Case, settings: RunSettings) -> list[Measurement]:
    """Time every provider of a case.

    Returns:
        One row per provider, including providers without a time.

    Raises:
        KeyError: If the baseline is not among the providers.
    """
    device, rounds = settings.device, settings.rounds_or(case.rounds)
    providers = dict(case.providers)
    if case.clone is not None:
        providers = {CLONE: _clone_provider(case.clone), **providers}
    providers[case.baseline]
    runners: dict[str, _Runner] = {}
    without: dict[str, tuple[AccuracyCheck | None, str]] = {}
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
    """Interpolate linearly between the sorted samples."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


_STARTED = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _row(
    case: Case,
    settings: RunSettings,
    rounds: int,
    name: str,
    runners: dict[str, _Runner],
    without: tuple[AccuracyCheck | None, str],
) -> Measurement:
    device, runner = settings.device, runners.get(name)
    verdict, note = (runner.verdict, "") if runner else without
    copied = 2 * case.clone[0].nbytes if case.clone is not None else None
    moved = copied if name == CLONE else case.bytes
    metrics: dict[str, float | int | None] = {}
    if runner:
        clone = runners.get(CLONE)
        if clone and moved and copied:
            pairs = zip(runner.graph or runner.times, clone.graph or clone.times, strict=True)
            metrics["clone_fraction"] = statistics.median(
                (moved / seconds) / (copied / clone_seconds) for seconds, clone_seconds in pairs
            )
        if runner.graph:
            metrics["graph_ms"] = statistics.median(runner.graph) * 1e3
        if device == "cuda":
            metrics["host_us"] = statistics.median(runner.host) * 1e6
        if all(call.countable for call in runner.calls) or device == "cuda":
            metrics["launches"] = op_metrics.launches(runner.next(), device)
        if device == "cuda" or not any(call.other_thread for call in runner.calls):
            metrics["peak_bytes"] = op_metrics.peak_bytes(runner.next(), device)
    if verdict:
        metrics |= {"error": verdict.error, "allowed": verdict.allowed}
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
        **metrics,
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
        if base:
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
        print(f"  {row.provider:<{width}}  " + "  ".join(part for part in parts if part))
