"""The machine code of the Triton kernels at the shapes that matter: widths, barriers, pipelining.

aot.py records, compiles, disassembles and executes the kernels in a subprocess. limits.py says what
a steady-state loop is and has limits for each kernel.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from tests.triton.limits import Row, limits, reads, steady

SCRIPT = Path(__file__).with_name("aot.py")
TARGETS = ("sm_80", "sm_90", "sm_100")
pytestmark = pytest.mark.slow


@functools.cache
def _rows(target: str, full: bool) -> list[Row]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--code", "--target", target]
    command += ["--full"] if full else ["--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(
    params=[
        *(pytest.param((target, False), id=target) for target in TARGETS),
        *(
            pytest.param((target, True), id=f"{target}-every-shape", marks=pytest.mark.full)
            for target in TARGETS
        ),
    ],
    scope="module",
)
def rows(request) -> list[Row]:
    found = _rows(*request.param)
    assert found, "nothing was compiled"
    return found


def _name(row: Row) -> str:
    return f"{row['kernel']} for {row['target']}, d = {row['d']}, r = {row['r']}, {row['dtype']}"


def _check(rows: list[Row], violations: Callable[[Row], Iterator[str]]) -> None:
    found = [f"{_name(row)}: {text}" for row in rows for text in violations(row)]
    assert not found, f"{len(found)} of {len(rows)} kernels or loops:\n" + "\n".join(found[:20])


def test_no_register_is_spilled(rows):
    def violations(row):
        if row["spills"] or row["stack"]:
            yield f"{row['spills']} bytes spilled, {row['stack']} bytes of stack"

    _check(rows, violations)


def test_rows_are_accessed_in_wide_vectors(rows):
    def violations(row):
        least = limits(row["kernel"], row["r"]).width
        for name, access in row["tensors"].items():
            if min(access["widths"]) < least:
                yield f"{min(access['widths'])} bytes per thread of {name}, at least {least}"

    _check(rows, violations)


@pytest.mark.parametrize("count", ["barriers", "conversions"])
def test_steady_state_loops_keep_their_limits(rows, count):
    """Few barriers, and no conversions of weights that arrive in the form of the products."""

    def violations(row):
        most = getattr(limits(row["kernel"], row["r"]), count)
        for number, loop in steady(row):
            if loop[count] > most:
                yield f"{loop[count]} {count} an iteration of loop {number}, at most {most}"

    _check(rows, violations)


def test_copies_are_in_flight(rows):
    def violations(row):
        least = limits(row["kernel"], row["r"]).buffers
        for number, loop in steady(row):
            if loop["copies"] and loop["buffers"] < least:
                yield f"{loop['buffers']} buffers in flight in loop {number}, at least {least}"

    _check(rows, violations)


def test_states_are_read_as_often_as_the_limits_say(rows):
    def violations(row):
        most = limits(row["kernel"], row["r"]).reads
        for name, times in reads(row).items():
            if times > most:
                yield f"{name} is read {times:.2f} times, at most {most}"

    _check(rows, violations)


def test_all_rows_forward_moves_whole_rows(rows):
    """One program reads d elements of each of its rows, and writes as many."""

    def violations(row):
        if not row["kernel"].startswith(("edit[all", "edit_all_rows[all")):
            return
        access = row["tensors"]["source"]
        size = row["d"] * (4 if row["dtype"] == "float32" else 2)
        count = access["written"] / size
        if access["written"] % size or access["read_distinct"] != access["written"]:
            yield (
                f"{access['read_distinct']} bytes of x read and {access['written']} of y written, "
                f"expected {size} for each of {count:.2f} rows"
            )

    _check(rows, violations)
