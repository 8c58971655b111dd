"""What the tests of compiled kernels share: rows of counts, limits, and what violates them.

A row describes one compiled kernel at one shape. tests/triton/aot.py makes rows of the Triton
kernels, tests/cuda/code.py of those of csrc/cuda; both print them as lines of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.roofline.reading import Region
from benchmarks.roofline.traces import SECTOR, Trace

Row = dict[str, Any]
TARGETS = ("sm_80", "sm_90", "sm_100")
# (target, whether every shape is compiled)
PARAMS = [pytest.param((target, False), id=target) for target in TARGETS] + [
    pytest.param((target, True), id=f"{target}-every-shape", marks=pytest.mark.full)
    for target in TARGETS
]
STEADY = 3  # loops with at least as many iterations in one program are steady-state loops
STATES = ("source", "grad", "saved_input")  # hidden states and gradients of them


class Limits(NamedTuple):
    """Limits of one kernel.

    Attributes:
        barriers: Most barriers in one iteration of a steady-state loop.
        width: Fewest bytes per thread of an access to a tensor whose rows have d elements.
        conversions: Most conversions of single floating-point numbers in such a loop.
        buffers: Fewest buffers in flight in a loop that copies asynchronously.
        reads: How often a row of the hidden state or its gradient is read.
    """

    barriers: int = 2
    width: int = 16
    conversions: int = 0
    buffers: int = 2
    reads: int = 1


Lookup = Callable[[str, int], Limits]  # of a kernel's label and rank


def region(counts: Region, iterations: int | None, buffers: int, steps: int = 1) -> Row:
    """Return what one iteration of a loop does; ``steps`` are the iterations that it unrolls."""

    def each(count: float) -> int:
        return round(count / steps)

    def widths(counts: Mapping[int, float]) -> dict[int, int]:
        return {width: each(count) for width, count in counts.items() if each(count)}

    return {
        "iterations": None if iterations is None else iterations * steps,
        "buffers": buffers,
        "instructions": each(counts.instructions),
        "barriers": each(counts.barriers),
        "loads": widths(counts.loads),
        "stores": widths(counts.stores),
        "copies": widths(counts.copies),
        "conversions": each(counts.scalar_conversions),
        "tensor": each(counts.tensor),
    }


def tensors(arguments: Mapping[str, torch.Tensor], trace: Trace, d: int) -> dict[str, Row]:
    """Return how one program accesses each tensor whose rows have d elements."""
    result: dict[str, Row] = {}
    for name in {access.buffer for access in trace.accesses.values()} & set(arguments):
        tensor = arguments[name]
        if tensor.shape[-1:] != (d,) or not tensor.dtype.is_floating_point:
            continue
        accesses = [access for access in trace.accesses.values() if access.buffer == name]
        loads = [access for access in accesses if access.kind in ("load", "copy")]
        stores = [access for access in accesses if access.kind == "store"]
        result[name] = {
            "widths": sorted({access.width for access in accesses}),
            "read": sum(access.sectors for access in loads) * SECTOR,
            "read_distinct": len(set().union(*(access.touched for access in loads))) * SECTOR,
            "written": sum(access.sectors for access in stores) * SECTOR,
        }
    return result


def run(script: Path, *arguments: str) -> list[Row]:
    """Return the rows that a script prints. Kernels are compiled without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def steady(row: Row) -> Iterator[tuple[int, Row]]:
    """Yield the number and the counts of each steady-state loop of a kernel."""
    for number, loop in enumerate(row["loops"]):
        if loop["iterations"] >= STEADY:
            yield number, loop


def reads(row: Row) -> dict[str, float]:
    """Return how often a program reads each hidden state or gradient of one."""
    found = {name: row["tensors"].get(name) for name in STATES}
    return {n: t["read"] / t["read_distinct"] for n, t in found.items() if t and t["read"]}


def reached(rows: list[Row]) -> Limits:
    """Return the limits that kernels keep, none beyond its target."""
    loops = [loop for row in rows for _, loop in steady(row)]
    widths = [width for row in rows for t in row["tensors"].values() for width in t["widths"]]
    buffers = [o["buffers"] for o in loops if o["copies"] or o.get("in_advance")]
    times = [-(-times // 1) for row in rows for times in reads(row).values()]
    target = Limits()
    return Limits(
        max([target.barriers, *(loop["barriers"] for loop in loops)]),
        min([target.width, *widths]),
        max([target.conversions, *(loop["conversions"] for loop in loops)]),
        min([target.buffers, *buffers]),
        max([target.reads, *map(int, times)]),
    )


def print_entries(key: Callable[[str], tuple[str, str]], narrow_rank: int) -> None:
    """Print what the kernels on standard input reach, as entries of a table of limits."""
    rows = [row for row in map(json.loads, sys.stdin) if not row["target"].startswith("gfx")]
    for entry in dict.fromkeys(key(row["kernel"]) for row in rows):
        classes = [
            reached(
                [r for r in rows if key(r["kernel"]) == entry and (r["r"] > narrow_rank) == wide]
            )
            for wide in (False, True)
        ]
        narrow, wide = (f"Limits({', '.join(map(str, one))})" for one in classes)
        print(f'    ("{entry[0]}", "{entry[1]}"): ({narrow}, {wide}),')


# ---- Violations


def _name(row: Row) -> str:
    return f"{row['kernel']} for {row['target']}, d = {row['d']}, r = {row['r']}, {row['dtype']}"


def check(rows: list[Row], violations: Callable[[Row], Iterator[str]]) -> None:
    """Fail with the violations of all rows."""
    found = [f"{_name(row)}: {text}" for row in rows for text in violations(row)]
    assert not found, f"{len(found)} of {len(rows)} kernels or loops:\n" + "\n".join(found[:20])


def spills(row: Row) -> Iterator[str]:
    """Yield the spills of a kernel."""
    if row["spills"] or row["stack"]:
        yield f"{row['spills']} bytes spilled, {row['stack']} bytes of stack"


def narrow_accesses(row: Row, limits: Lookup) -> Iterator[str]:
    """Yield accesses to rows that are narrower than the limit."""
    least = limits(row["kernel"], row["r"]).width
    for name, access in row["tensors"].items():
        if min(access["widths"]) < least:
            yield f"{min(access['widths'])} bytes per thread of {name}, at least {least}"


def steady_counts(row: Row, limits: Lookup, count: str) -> Iterator[str]:
    """Yield steady-state loops that have more of ``count`` than the limit."""
    most = getattr(limits(row["kernel"], row["r"]), count)
    for number, loop in steady(row):
        if loop[count] > most:
            yield f"{loop[count]} {count} an iteration of loop {number}, at most {most}"


def few_buffers(row: Row, limits: Lookup) -> Iterator[str]:
    """Yield steady-state loops with fewer buffers in flight than the limit."""
    least = limits(row["kernel"], row["r"]).buffers
    for number, loop in steady(row):
        if (loop["copies"] or loop.get("in_advance")) and loop["buffers"] < least:
            yield f"{loop['buffers']} buffers in flight in loop {number}, at least {least}"


def repeated_reads(row: Row, limits: Lookup) -> Iterator[str]:
    """Yield states that are read more often than the limit."""
    most = limits(row["kernel"], row["r"]).reads
    for name, times in reads(row).items():
        if times > most:
            yield f"{name} is read {times:.2f} times, at most {most}"


def partial_rows(row: Row, programs: int = 1) -> Iterator[str]:
    """Yield a forward over all rows whose ``programs``, together, do not move whole rows once."""
    access = row["tensors"]["source"]
    size = row["d"] * (4 if row["dtype"] == "float32" else 2)
    written = access["written"] * programs
    if written % size or access["read_distinct"] != access["written"]:
        yield (
            f"{access['read_distinct'] * programs} bytes of x read and {written} of y written, "
            f"expected {size} for each of {written / size:.2f} rows"
        )
