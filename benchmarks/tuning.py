"""Time each kernel's launch parameters against adjacent values and propose changes.

    python -m benchmarks.tuning [--quick] [--csv FILE] [--device cuda] [--cases LABEL ...]
        [--candidates N] [--candidate-seconds N] [--seconds N] [--resume]

An adjacent configuration differs in one parameter, halved or doubled. All candidates of a shape
are compared with fp64 and timed in turn on the same inputs. A candidate is proposed if its median
is below the current one by more than ``WORTH`` and its 80th percentile is below the current 20th.
The script only prints proposals; it does not change the heuristics. Rows are written when their
case is measured; a candidate that compiles for longer than ``--candidate-seconds`` is left out.
Exit status: as for :mod:`benchmarks.run`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import reft_kernels
from benchmarks import edits, harness, machine, rows, stopping
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
from benchmarks.suites import r_build
from reft_kernels import dispatch

WORTH = 0.03
PRESENT = "present"
SUITE = "tuning"
KNOBS = {  # launch parameter: smallest and largest value tried, in order of expected effect
    "num_stages": (1, 4),
    "read_stages": (2, 6),
    "write_stages": (2, 6),
    "block_n": (1, 128),
    "block_d": (16, 4096),
    "num_warps": (1, 16),
    "block_c": (16, 256),
    "chunks": (1, 1024),
    "splits": (1, 64),
}


@dataclass(frozen=True)
class Limits:
    """Limits of the search.

    Attributes:
        candidates: Most candidates per case, or None for all.
        seconds: Most seconds of one candidate's compilation and check, or None for any.
    """

    candidates: int | None = None
    seconds: float | None = None


def adjacent(config: object) -> dict[str, object]:
    """Return the configurations that differ from ``config`` in one parameter, by parameter."""
    configs = {}
    for name, (low, high) in KNOBS.items():
        value = getattr(config, name, None)
        for other in (value * 2, value // 2) if value else ():
            if low <= other <= high:
                configs[f"{name}={other}"] = dataclasses.replace(config, **{name: other})
    return configs


@contextlib.contextmanager
def using(module: ModuleType, name: str, config: object) -> Iterator[None]:
    """Replace a module's heuristic by one that returns ``config``."""
    heuristic = getattr(module, name)
    setattr(module, name, lambda *_: config)
    try:
        yield
    finally:
        setattr(module, name, heuristic)


def kernel_module(name: str) -> ModuleType:
    """Return a module of the Triton backend, whose package exports functions of the same names."""
    return importlib.import_module(f"reft_kernels.triton.{name}")


def _recorded(module: ModuleType, name: str, call: Call) -> object:
    """Return the configuration that the heuristic chooses during a call."""
    heuristic, seen = getattr(module, name), []
    setattr(module, name, lambda *arguments: seen.append(heuristic(*arguments)) or seen[-1])
    try:
        call.once()
    finally:
        setattr(module, name, heuristic)
    if not seen:
        raise ProviderUnavailable(f"{name} is not used for this shape")
    return seen[0]


@contextlib.contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise ``TimeoutError`` in the main thread when the block takes longer than ``seconds``."""

    def over(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds:g} s")

    if not seconds:
        yield
        return
    former = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def candidates(
    module: ModuleType,
    heuristic: str,
    prepare: Callable[[int], Call],
    check: Callable[[], AccuracyCheck] | None,
    limits: Limits = Limits(),
) -> dict[str, Provider]:
    """Return a provider for the current configuration and one for each adjacent configuration."""
    present = _recorded(module, heuristic, prepare(0))

    def provider(config: object) -> Provider:
        def configured(k: int) -> Call:
            return dataclasses.replace(prepare(k), context=lambda: using(module, heuristic, config))

        def checked() -> AccuracyCheck:
            try:
                with using(module, heuristic, config), limited(limits.seconds):
                    return check()
            except Exception as error:  # does not compile, or needs too much shared memory
                lines = str(error).splitlines() or [""]
                raise ProviderUnavailable(f"{type(error).__name__}: {lines[0][:120]}") from None

        return Provider(configured, checked if check else None)

    neighbours = list(adjacent(present).items())[: limits.candidates]
    return {PRESENT: provider(present)} | {name: provider(config) for name, config in neighbours}


EDIT_SHAPES = ((448, 4096, 8), (8192, 4096, 8), (112, 4096, 8), (8192, 4096, 32), (8192, 2048, 8))
BUILD_SHAPES = ((32, 4096, 8), (1, 4096, 8), (32, 4096, 32), (16, 2048, 8))
EDIT_HEURISTICS = (  # module, heuristic, mode
    ("edit", "edit_config", "forward"),
    ("edit_all_rows", "all_rows_config", "forward"),
    ("edit_delta", "delta_config", "backward"),
    ("edit_gradient", "gradient_config", "backward"),
)


def specs(settings: RunSettings, limits: Limits = Limits()) -> Iterator[CaseSpec]:
    """Yield the case of each shape and heuristic."""
    for dtype in (torch.float32,) if settings.quick else (torch.bfloat16, torch.float32):
        for count, d, rank in ((4, 32, 2),) if settings.quick else EDIT_SHAPES:
            for module, heuristic, mode in EDIT_HEURISTICS:
                shape = {"rows": count, "d": d, "r": rank, "heuristic": heuristic}
                build = functools.partial(
                    _edit_case, module, mode, shape, dtype, settings.device, limits
                )
                yield CaseSpec(mode, shape, dtype, build)
    for layers, d, rank in ((2, 32, 2),) if settings.quick else BUILD_SHAPES:
        for mode in ("forward", "both"):
            shape = {"layers": layers, "d": d, "r": rank, "heuristic": "build_config"}
            build = functools.partial(_build_case, mode, shape, settings.device, limits)
            yield CaseSpec(mode, shape, torch.float32, build)


def _edit_case(
    module: str,
    mode: str,
    shape: dict[str, object],
    dtype: torch.dtype,
    device: str,
    limits: Limits,
) -> Case:
    torch.manual_seed(0)
    count, d, rank = (int(shape[name]) for name in ("rows", "d", "r"))
    touched = edits.touched_bytes(count, d, dtype, mode)
    sets = min(4, harness.sets_for(touched, device, 2 * count * d * dtype.itemsize))
    problems = edits.draw(count, d, rank, dtype, device, sets)
    gate = edits.EditGate(problems[0], backward=mode == "backward")
    default = edits.provider(reft_kernels.loreft, problems, mode, gate)
    providers = candidates(
        kernel_module(module), str(shape["heuristic"]), default.prepare, default.check, limits
    )
    moved = edits.least_bytes(count, d, rank, dtype, mode)
    hidden = [problem.hidden for problem in problems]
    return Case(SUITE, mode, shape, dtype, providers, PRESENT, sets, moved, hidden)


def _build_case(mode: str, shape: dict[str, object], device: str, limits: Limits) -> Case:
    layers, d, rank = (int(shape[name]) for name in ("layers", "d", "r"))
    case = r_build.case(layers, d, rank, mode, device)
    default = case.providers["reft_kernels householder"]
    providers = candidates(
        kernel_module("orthonormal_launch"),
        str(shape["heuristic"]),
        default.prepare,
        default.check,
        limits,
    )
    return dataclasses.replace(
        case, suite=SUITE, shape=shape, providers=providers, baseline=PRESENT
    )


def proposals(rows_of_case: list[Measurement]) -> list[str]:
    """Return a line for each adjacent configuration that is faster by more than noise."""
    present = next((row for row in rows_of_case if row.provider == PRESENT), None)
    if present is None or present.median_ms is None:
        return []
    current_ms = present.graph_ms or present.median_ms
    return [
        f"{row.shape}, {row.dtype}, {row.mode}: {row.provider} takes "
        f"{(row.graph_ms or row.median_ms) / current_ms:.2f} of the present"
        for row in rows_of_case
        if row.median_ms is not None
        and "=" in row.provider
        and (row.graph_ms or row.median_ms) < (1 - WORTH) * current_ms
        and row.p80_ms < present.p20_ms
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 2 on invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning",
        description="Time launch parameters of the Triton kernels against adjacent values.",
    )
    parser.add_argument("--quick", action="store_true", help="use one small shape and few rounds")
    parser.add_argument("--csv", type=Path, help="append raw rows to this file")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=15, help="samples per provider")
    parser.add_argument("--cases", nargs="+", default=[], metavar="LABEL", help="cases to run")
    parser.add_argument("--candidates", type=int, help="most candidates per case (default: all)")
    parser.add_argument(
        "--candidate-seconds", type=float, help="leave out a candidate that compiles for longer"
    )
    parser.add_argument("--seconds", type=float, help="end the run after this time")
    parser.add_argument(
        "--resume", action="store_true", help="leave out cases that are in the file of --csv"
    )
    args = parser.parse_args(argv)
    if args.device == "cpu" and not dispatch.interpreting():
        print(
            "--device: Triton kernels need a GPU, or a CPU with TRITON_INTERPRET=1", file=sys.stderr
        )
        return 2
    limits = Limits(args.candidates, args.candidate_seconds)
    settings = RunSettings(
        args.device, args.quick, 3 if args.quick else args.rounds, labels=tuple(args.cases)
    )
    found = {spec.label: spec for spec in specs(settings, limits)}
    unknown = [label for label in settings.labels if label not in found]
    if unknown:
        print(f"--cases: got {unknown[0]!r}, expected of: {'; '.join(found)}", file=sys.stderr)
        return 2
    done = set()
    if args.resume and args.csv and args.csv.exists():
        done = {
            f"{row.mode} {row.shape} {row.dtype}"
            for row in rows.read(args.csv)
            if row.commit == machine.commit() and not row.note.startswith(harness.CUT_OFF)
        }
    stopping.install(args.seconds)
    proposed: list[str] = []
    failed = False
    with dispatch.backend("triton"):
        for label in settings.labels or found:
            if stopping.requested():
                break
            if label in done:
                continue
            results = harness.measure_spec(SUITE, found[label], settings)
            failed |= not any(row.median_ms is not None for row in results)
            harness.show(results)
            proposed += proposals(results)
            if args.csv:
                rows.append(results, args.csv)
    print(
        "\n".join(["proposed:", *proposed])
        if proposed
        else "proposed: nothing, no adjacent configuration is faster by more than noise",
        flush=True,
    )
    return stopping.status() if stopping.requested() else int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
