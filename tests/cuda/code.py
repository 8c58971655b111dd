"""Report what the compiled kernels of csrc/cuda do, without a GPU.

    python tests/cuda/code.py [--full] [--target sm_90 ...]

The host code of csrc/cuda runs with a runtime that records its launches
(benchmarks/roofline/native_launches.py); one block of each is executed as PTX. The script prints
one line of JSON per launch: see tests/compiled_code.py. It runs in its own process, because it
registers the operators of the CUDA library with another library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.roofline import native, native_launches, native_steps, shapes
from benchmarks.roofline.targets import TARGETS
from tests import compiled_code

DIMS, RANKS, TYPES = (768, 4096, 8192), (1, 4, 8, 16, 32, 64), ("bfloat16", "float32")
REGIMES = {"selected": 448, "all": 8192}  # rows
LAYERS = 32


class Shape(NamedTuple):
    """What to compile for one target."""

    d: int
    r: int
    dtype: str
    target: str


def shapes_of(full: bool, target: str) -> list[Shape]:
    """Return the shapes of a target: all, or those that include each kernel and rank class."""
    if full:
        return [Shape(d, r, t, target) for d in DIMS for r in RANKS for t in TYPES]
    few = {
        "sm_80": [(768, 8, "bfloat16"), (4096, 4, "float32")],
        "sm_90": [(4096, 8, "bfloat16"), (8192, 16, "bfloat16"), (4096, 32, "float32")],
        "sm_100": [(4096, 1, "bfloat16"), (768, 64, "bfloat16")],
    }
    return [Shape(*one, target) for one in few[target]]


def calls(shape: Shape) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Return the labelled calls of a shape."""
    dtype = getattr(torch, shape.dtype)
    for regime, rows in REGIMES.items():
        chosen = regime == "selected"
        edit = shapes.EditCall(rows, shape.d, shape.r, dtype, chosen, backend="cuda")
        yield regime, edit.forward
        yield regime, edit.backward
    # on sm_80 a barrier of the grid would need other blocks; one block a layer has none
    layers = LAYERS if shape.target != "sm_80" else native_launches.model.H200.processors
    if shape.dtype == "float32":
        yield "householder", lambda: shapes.build(layers, shape.d, shape.r, backend="cuda")
        yield "householder", lambda: shapes.build_backward(layers, shape.d, shape.r, backend="cuda")


def _unrolled(launch: native_launches.NativeLaunch) -> int:
    """Return how many tiles one iteration of a kernel's main loop processes."""
    name, _, numbers = native.identity(launch.symbol)
    if name == "edit_tiles_kernel":
        return 3 if numbers == (1, 1) else 2
    return 2 if name == "edit_delta_tiles_kernel" else 1


def row(shape: Shape, label: str, launch: native_launches.NativeLaunch) -> compiled_code.Row:
    """Return the counts of one launch."""
    target = TARGETS[shape.target]
    compiled = native_launches.compile_launch(launch, target)
    assert compiled.kernel is not None and compiled.code is not None
    block = native_launches.samples(launch)[0]
    trace = native_launches.machine(launch, compiled).run(block)
    tiles = _unrolled(launch)
    loops = []
    for step in native_steps.steps(compiled.code, compiled.kernel, trace)[1:]:
        unrolled = tiles if step.region.tensor and step.iterations > 1 else 1
        buffers = step.buffers
        if unrolled > 1:  # tiles are loaded to registers in advance
            buffers = 1 + round(step.distance * unrolled / step.region.instructions)
        loop = compiled_code.region(step.region, step.iterations, buffers, unrolled)
        loops.append(loop | {"in_advance": unrolled > 1})
    return {
        "kernel": f"{launch.name.removesuffix('_kernel')}[{label}]",
        **shape._asdict(),
        "registers": compiled.registers,
        "stack": compiled.stack,
        "spills": compiled.spills,
        "shared": compiled.shared,
        "shared_limit": target.shared_limit,
        "cluster": launch.cluster,
        "grid": launch.grid,
        "loops": loops,
        "tensors": compiled_code.tensors(launch.tensors, trace, shape.d),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--target", action="append", choices=("sm_80", "sm_90", "sm_100"))
    args = parser.parse_args()
    for target in args.target or ("sm_80", "sm_90", "sm_100"):
        for shape in shapes_of(args.full, target):
            for label, call in calls(shape):
                try:
                    recorded = native_launches.record(TARGETS[target], call)
                except native_launches.NotServed:
                    continue
                for launch in recorded:
                    print(json.dumps(row(shape, label, launch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
