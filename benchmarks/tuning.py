"""Do the launch heuristics choose well? Times each kernel's present knobs against their adjacent,
and proposes changes.

    python -m benchmarks.tuning [--quick] [--csv FILE] [--device cuda]

A neighbour differs in one knob. All candidates of a shape are timed in turn on the same inputs,
each held to fp64 first; a neighbour is proposed where its median is below the present one's by more
than ``WORTH`` and its 80th percentile below the
present 20th. Proposals are evidence for a person who edits the heuristic: nothing is changed here.
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
from benchmarks.harness import Call, Case, Provider, Settings
from benchmarks.rows import Row
from benchmarks.suites import r_build
from reft_kernels import dispatch

WORTH = 0.03
PRESENT = "present"
KNOBS = {  # knob: smallest and largest value tried
    "block_n": (1, 128),
    "block_d": (16, 4096),
    "block_c": (16, 256),
    "chunks": (1, 1024),
    "splits": (1, 64),
    "num_warps": (1, 16),
    "num_stages": (1, 4),
}


def adjacent(config: object) -> dict[str, object]:
    """Configurations that differ from one in a single knob, halved or doubled, by what differs."""
    found = {}
    for name, (low, high) in KNOBS.items():
        value = getattr(config, name, None)
        for other in (value // 2, value * 2) if value else ():
            if low <= other <= high:
                found[f"{name}={other}"] = dataclasses.replace(config, **{name: other})
    return found


@contextlib.contextmanager
def using(module: ModuleType, name: str, config: object) -> Iterator[None]:
    """Let a module's heuristic answer with one configuration."""
    heuristic = getattr(module, name)
    setattr(module, name, lambda *_: config)
    try:
        yield
    finally:
        setattr(module, name, heuristic)


def _kernels(name: str) -> ModuleType:
    """A module of the Triton backend, whose package has functions of the same names."""
    return importlib.import_module(f"reft_kernels.triton.{name}")


def _recorded(module: ModuleType, name: str, call: Call) -> object:
    """The configuration that the heuristic gives while a call runs."""
    heuristic, seen = getattr(module, name), []
    setattr(module, name, lambda *arguments: seen.append(heuristic(*arguments)) or seen[-1])
    try:
        call.once()
    finally:
        setattr(module, name, heuristic)
    return seen[0]


def _candidates(
    module: ModuleType,
    heuristic: str,
    prepare: Callable[[int], Call],
    check: Callable[[], harness.Verdict] | None,
) -> dict[str, Provider]:
    present = _recorded(module, heuristic, prepare(0))

    def provider(config: object) -> Provider:
        def configured(k: int) -> Call:
            return dataclasses.replace(prepare(k), context=lambda: using(module, heuristic, config))

        def checked() -> harness.Verdict:
            try:
                with using(module, heuristic, config):
                    return check()
            except (
                Exception
            ) as error:  # a candidate that does not compile or needs too much shared memory
                raise harness.Absent(
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                ) from None

        return Provider(configured, checked if check else None)

    return {PRESENT: provider(present)} | {
        name: provider(config) for name, config in adjacent(present).items()
    }


def _edit_cases(settings: Settings) -> Iterator[Case]:
    edit, delta, gradient = (_kernels(f"edit{part}") for part in ("", "_delta", "_gradient"))
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
                gate = edits.Gate(problems[0], backward=mode == "backward")
                own = edits.provider(reft_kernels.loreft, problems, mode, gate)
                moved = edits.least_bytes(count, d, rank, dtype, mode)
                try:
                    providers = _candidates(module, heuristic, own.prepare, own.check)
                except IndexError:  # this shape does not reach the heuristic
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


def _build_cases(settings: Settings) -> Iterator[Case]:
    orthonormal_launch = _kernels("orthonormal_launch")
    for layers, d, rank in (
        [(2, 64, 4)]
        if settings.quick
        else [(1, 4096, 8), (32, 4096, 8), (32, 4096, 32), (16, 2048, 8)]
    ):
        for mode in ("forward", "both"):
            torch.manual_seed(0)
            case = r_build.case(layers, d, rank, mode, settings.device)
            own = case.providers["reft_kernels householder"]
            providers = _candidates(orthonormal_launch, "build_config", own.prepare, own.check)
            shape = case.shape | {"heuristic": "build_config"}
            yield dataclasses.replace(
                case, suite="tuning", shape=shape, providers=providers, baseline=PRESENT
            )


def proposals(found: list[Row]) -> list[str]:
    """A line for each neighbour that beats the present knobs of its case by more than noise."""
    present = next(row for row in found if row.provider == PRESENT)
    if present.median_ms is None:
        return []
    own = present.graph_ms or present.median_ms
    return [
        f"{row.shape}, {row.dtype}, {row.mode}: {row.provider} takes "
        f"{(row.graph_ms or row.median_ms) / own:.2f} of the present"
        for row in found
        if row.median_ms is not None
        and row.provider in _knobs(found)
        and (row.graph_ms or row.median_ms) < (1 - WORTH) * own
        and row.p80_ms < present.p20_ms
    ]


def _knobs(found: list[Row]) -> set[str]:
    return {row.provider for row in found if "=" in row.provider}


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning", description="Time launch knobs against adjacent."
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds")
    parser.add_argument("--csv", type=Path, help="append the raw rows to this file")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not dispatch.interpreting():
        print(
            "--device: Triton kernels run on a GPU, or with TRITON_INTERPRET=1 on a CPU",
            file=sys.stderr,
        )
        return 2
    settings = Settings(args.device, args.quick, 3 if args.quick else args.rounds)
    proposed: list[str] = []
    with dispatch.backend("triton"):
        for cases in (_edit_cases, _build_cases):
            for case in cases(settings):
                found = harness.measure(case, settings)
                harness.show(found)
                proposed += proposals(found)
                if args.csv:
                    rows.append(found, args.csv)
    print(
        "\n".join(["proposed:", *proposed])
        if proposed
        else "proposed: nothing, no neighbour is faster by more than noise"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
