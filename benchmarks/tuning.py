"""Time each kernel's launch parameters against adjacent values and propose changes.

    python -m benchmarks.tuning [--quick] [--csv FILE] [--device cuda]

An adjacent configuration differs in one parameter, halved or doubled. All candidates of a shape
are compared with fp64 and timed in turn on the same inputs. A candidate is proposed if its median
is below the current one by more than ``WORTH`` and its 80th percentile is below the current 20th.
The script only prints proposals; it does not change the heuristics.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

import reft_kernels
from benchmarks import edits, harness, rows
from benchmarks.protocol import (
    AccuracyCheck,
    Call,
    Case,
    Provider,
    ProviderUnavailable,
    RunSettings,
)
from benchmarks.rows import Measurement
from benchmarks.suites import r_build
from reft_kernels import dispatch

WORTH = 0.03
PRESENT = "present"
KNOBS = {  # launch parameter: smallest and largest value tried
    "block_n": (1, 128),
    "block_d": (16, 4096),
    "block_c": (16, 256),
    "chunks": (1, 1024),
    "splits": (1, 64),
    "num_warps": (1, 16),
    "num_stages": (1, 4),
}


def adjacent(config: object) -> dict[str, object]:
    """Return the configurations that differ from ``config`` in one parameter, by parameter."""
    configs = {}
    for name, (low, high) in KNOBS.items():
        value = getattr(config, name, None)
        for other in (value // 2, value * 2) if value else ():
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
    return seen[0]


def candidates(
    module: ModuleType,
    heuristic: str,
    prepare: Callable[[int], Call],
    check: Callable[[], AccuracyCheck] | None,
) -> dict[str, Provider]:
    """Return a provider for the current configuration and one for each adjacent configuration."""
    present = _recorded(module, heuristic, prepare(0))

    def provider(config: object) -> Provider:
        def configured(k: int) -> Call:
            return dataclasses.replace(prepare(k), context=lambda: using(module, heuristic, config))

        def checked() -> AccuracyCheck:
            try:
                with using(module, heuristic, config):
                    return check()
            except Exception as error:  # does not compile, or needs too much shared memory
                raise ProviderUnavailable(
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                ) from None

        return Provider(configured, checked if check else None)

    return {PRESENT: provider(present)} | {
        name: provider(config) for name, config in adjacent(present).items()
    }


def _edit_cases(settings: RunSettings) -> Iterator[Case]:
    edit, delta, gradient = (kernel_module(f"edit{part}") for part in ("", "_delta", "_gradient"))
    shapes = (
        [(64, 64, 4)]
        if settings.quick
        else [(112, 4096, 8), (448, 4096, 8), (8192, 4096, 8), (8192, 4096, 32), (8192, 2048, 8)]
    )
    for dtype in (torch.float32,) if settings.quick else (torch.bfloat16, torch.float32):
        for count, d, rank in shapes:
            torch.manual_seed(0)
            sets = min(4, harness.sets_for(2 * count * d * dtype.itemsize, settings.device))
            problems = edits.draw(count, d, rank, dtype, settings.device, sets)
            shape = {"rows": count, "d": d, "r": rank}
            for module, heuristic, mode in (
                (edit, "edit_config", "forward"),
                (delta, "delta_config", "backward"),
                (gradient, "gradient_config", "backward"),
            ):
                gate = edits.EditGate(problems[0], backward=mode == "backward")
                default = edits.provider(reft_kernels.loreft, problems, mode, gate)
                moved = edits.least_bytes(count, d, rank, dtype, mode)
                try:
                    providers = candidates(module, heuristic, default.prepare, default.check)
                except IndexError:  # the heuristic is not called for this shape
                    continue
                yield Case(
                    "tuning",
                    mode,
                    shape | {"heuristic": heuristic},
                    dtype,
                    providers,
                    PRESENT,
                    sets,
                    moved,
                    [problem.hidden for problem in problems],
                )


def _build_cases(settings: RunSettings) -> Iterator[Case]:
    orthonormal_launch = kernel_module("orthonormal_launch")
    for layers, d, rank in (
        [(2, 64, 4)]
        if settings.quick
        else [(1, 4096, 8), (32, 4096, 8), (32, 4096, 32), (16, 2048, 8)]
    ):
        for mode in ("forward", "both"):
            torch.manual_seed(0)
            case = r_build.case(layers, d, rank, mode, settings.device)
            default = case.providers["reft_kernels householder"]
            providers = candidates(
                orthonormal_launch, "build_config", default.prepare, default.check
            )
            shape = case.shape | {"heuristic": "build_config"}
            yield dataclasses.replace(
                case, suite="tuning", shape=shape, providers=providers, baseline=PRESENT
            )


def proposals(rows_of_case: list[Measurement]) -> list[str]:
    """Return a line for each adjacent configuration that is faster by more than noise."""
    present = next(row for row in rows_of_case if row.provider == PRESENT)
    if present.median_ms is None:
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
    args = parser.parse_args(argv)
    if args.device == "cpu" and not dispatch.interpreting():
        print(
            "--device: Triton kernels need a GPU, or a CPU with TRITON_INTERPRET=1", file=sys.stderr
        )
        return 2
    settings = RunSettings(args.device, args.quick, 3 if args.quick else args.rounds)
    proposed: list[str] = []
    with dispatch.backend("triton"):
        for cases in (_edit_cases, _build_cases):
            for case in cases(settings):
                results = harness.measure(case, settings)
                harness.show(results)
                proposed += proposals(results)
                if args.csv:
                    rows.append(results, args.csv)
    print(
        "\n".join(["proposed:", *proposed])
        if proposed
        else "proposed: nothing, no adjacent configuration is faster by more than noise"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
