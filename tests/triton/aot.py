"""Compile Triton kernels ahead of time without a GPU and report what the compiled code does.

    python tests/triton/aot.py [--full] [--target sm_90 ...] [--group edit ...] [--workers N]
    python tests/triton/aot.py --code [--full] [--target sm_90 ...]

The launchers run on CPU tensors, their launches are recorded (benchmarks/roofline/launches.py) and
compiled. The script prints one line of JSON per kernel: its target, d, r, dtype, registers, spills,
stack and shared memory in bytes, and the target's limit. ``--code`` takes the shapes of
test_compiled_code.py and adds the loops and the accesses to global memory.

The script must run in its own process, because kernels cannot be compiled under Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.roofline import compiling, launches, reading, shapes, steps, tracing
from benchmarks.roofline.targets import TARGETS, Target
from tests import compiled_code

DIMS = (768, 2048, 4096, 5120, 8192)
RANKS = (1, 4, 8, 16, 32, 64)
HALF = ("bfloat16", "float16")
# name: whether B x is subtracted, the activation, and whether there are weight sets
VARIANTS = {
    "folded": (False, "linear", False),
    "loreft": (True, "linear", False),
    "gelu+sets+coeff": (True, "gelu", True),
}
REGIMES = {"selected": 448, "all": 8192}


class Job(NamedTuple):
    """Calls to record and compile for one target; ``group`` names them."""

    group: str
    d: int
    r: int
    dtype: str
    target: str
    code: bool = False


def _edits(job: Job, variants: tuple[str, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    dtype = getattr(torch, job.dtype)
    for (regime, rows), variant in itertools.product(REGIMES.items(), variants):
        edit = shapes.EditCall(rows, job.d, job.r, dtype, regime == "selected", *VARIANTS[variant])
        yield f"{regime},{variant}", edit.forward
        if dtype == torch.bfloat16:
            exact = shapes.EditCall(
                *(rows, job.d, job.r, dtype, regime == "selected", *VARIANTS[variant]),
                rounded=False,
            )
            yield f"{regime},{variant},fp32 weights", exact.forward
        yield f"{regime},{variant}", edit.backward


def _reds(job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    for (regime, rows), backward in itertools.product(REGIMES.items(), (False, True)):
        arguments = (rows, job.d, getattr(torch, job.dtype), regime == "selected", backward)
        yield regime, functools.partial(shapes.red, *arguments)


def _builds(job: Job) -> Iterator[tuple[str, Callable[[], Any]]]:
    backend = importlib.import_module("reft_kernels.triton")
    d, r, layers = job.d, job.r, 32
    for name, has_base, has_W in itertools.product(
        ("householder", "cayley"), (False, True), (False, True)
    ):
        X, tall = torch.empty(layers, d, r), torch.empty(layers, r, d)
        base = (torch.empty(layers, r), torch.empty_like(X)) if has_base else (None, None)
        point = tall if has_base else None
        aux = torch.empty(layers, 1 + has_base, r, r)
        label = f"{name}{',base' * has_base}{',W' * has_W}"
        forward, backward = getattr(backend, name), getattr(backend, f"{name}_backward")
        yield label, functools.partial(forward, X, *base, point, tall if has_W else None)
        grads = (torch.empty_like(tall), torch.empty_like(tall) if has_W else None)
        yield label, functools.partial(backward, *grads, X, *base, aux)


def calls(job: Job) -> list[tuple[str, Callable[[], Any]]]:
    """Return the labelled calls of a job."""
    if job.group == "red":
        return list(_reds(job))
    if job.group == "orthonormal":
        every = list(_builds(job))
        return [call for call in every if call[0] == "householder,W"] if job.code else every
    variants = ("folded",) if job.group == "folded" else tuple(VARIANTS)
    return list(_edits(job, variants))


def _code(launch: launches.Launch, compiled: compiling.Compiled, d: int) -> dict[str, Any]:
    """Return the loops of a kernel and its accesses to tensors whose rows have d elements."""
    if compiled.kernel is None:
        loops = [compiled_code.region(region, None, 0) for region in reading.walk(compiled.region)]
        return {"loops": loops, "tensors": {}}
    chosen = tracing.samples(launch)
    trace = tracing.machine(launch, compiled).run(chosen[len(chosen) // 2])
    found = steps.steps(compiled.kernel, compiled.region, trace)
    loops = [compiled_code.region(one.region, one.iterations, one.buffers) for one in found[1:]]
    return {"loops": loops, "tensors": compiled_code.tensors(launch.arguments, trace, d)}


def _synchronization(assembly: str, target: Target) -> dict[str, int]:
    """Count atomics, and those of them that order memory and directly follow a barrier."""
    if target.backend == "hip":
        pattern = r"^\s*(?:global|flat|buffer)_atomic"
        return {"atomics": len(re.findall(pattern, assembly, re.MULTILINE))}
    pattern = r"^\s*(?:@\S+\s+)?(bar\.sync|atom\.\S+|red\.\S+|st\.global)"
    steps = re.findall(pattern, assembly, re.MULTILINE)
    atomics = [k for k, step in enumerate(steps) if step.startswith(("atom.", "red."))]
    ordered = [k for k in atomics if steps[k - 1] == "bar.sync" and "gpu.acq_rel" in steps[k]]
    return {"atomics": len(atomics), "atomics_after_barrier": len(ordered)}


def compile_job(job: Job) -> list[dict[str, Any]]:
    """Compile all launches of a job and return one row for each."""
    target: Target = TARGETS[job.target]
    rows = []
    for label, call in calls(job):
        for launch in launches.record(target, call):
            compiled = compiling.compile_launch(launch, target)
            row = {
                "kernel": f"{launch.name.removesuffix('_kernel')}[{label}]",
                "target": job.target,
                "d": job.d,
                "r": job.r,
                "dtype": job.dtype,
                "registers": compiled.registers,
                "threads": compiled.threads,
                "stack": compiled.stack,
                "spills": compiled.spills,
                "shared": compiled.shared,
                "shared_limit": target.shared_limit,
                **_synchronization(compiled.assembly, target),
            }
            rows.append(row | (_code(launch, compiled, job.d) if job.code else {}))
    return rows


def jobs(full: bool, targets: list[str]) -> list[Job]:
    """Return what to compile.

    With ``full=True`` every shape, else a set that includes each kernel, both rank classes and
    every target.
    """
    if full:
        wanted = [("edit", d, r, t) for d in DIMS for r in RANKS for t in (*HALF, "float32")]
        wanted += [("red", d, 2, t) for d in DIMS for t in (*HALF, "float32")]
        wanted += [("orthonormal", d, r, "float32") for d in DIMS for r in RANKS]
    else:
        wanted = [("edit", 4096, 8, "bfloat16"), ("red", 4096, 2, "bfloat16")]
        wanted += [("orthonormal", 4096, 8, "float32")]
        wanted += [("folded", 5120, 64, "bfloat16")]  # with --full every variant: they take minutes
    extra = [("edit", 4096, 8, "float32"), ("orthonormal", 5120, 64, "float32")]
    return [
        Job(*one, target)
        for target in targets
        for one in (*wanted, *(extra if target == "sm_90" and not full else ()))
    ]


def code_jobs(full: bool, targets: list[str]) -> list[Job]:
    """Return the shapes of which test_compiled_code.py reads the code."""
    if full:
        dims, types = (768, 4096, 8192), ("bfloat16", "float32")
        wanted = [("folded", d, r, t) for d in dims for r in RANKS for t in types]
        wanted += [("orthonormal", d, r, "float32") for d in dims for r in RANKS]
        return [Job(*one, target, True) for target in targets for one in wanted]
    few = {
        "sm_80": [("folded", 768, 8, "bfloat16")],
        "sm_90": [
            ("folded", 4096, 8, "bfloat16"),
            ("folded", 8192, 32, "bfloat16"),
            ("folded", 4096, 8, "float32"),
            ("orthonormal", 4096, 8, "float32"),
        ],
        "sm_100": [("folded", 4096, 64, "bfloat16")],
    }
    return [Job(*one, target, True) for target in targets for one in few.get(target, [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--code", action="store_true", help="report loops and accesses")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS))
    parser.add_argument(
        "--group", action="append", choices=("edit", "folded", "red", "orthonormal")
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    choose = code_jobs if args.code else jobs
    work = [
        job
        for job in choose(args.full, args.target or list(TARGETS))
        if not args.group or job.group in args.group
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        for rows in pool.map(compile_job, work):
            for row in rows:
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
