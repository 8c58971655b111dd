"""The machine code of csrc/cuda at the shapes that matter: widths, barriers, rows in flight.

code.py records, compiles and executes the kernels in a subprocess. limits.py has limits for each
kernel; tests/compiled_code.py says what violates them. What nvcc made is kept in the build folder
until the sources change.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton, whose nvdisasm reads machine code")

from benchmarks.roofline import native
from tests import compiled_code
from tests.compiled_code import Row, check, run
from tests.cuda.limits import limits

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.nvcc() is None, reason="nvcc is not installed"),
]
SCRIPT = Path(__file__).with_name("code.py")


@functools.cache
def _rows(target: str, full: bool) -> list[Row]:
    return run(SCRIPT, "--target", target, *["--full"] * full)


@pytest.fixture(params=compiled_code.PARAMS, scope="module")
def rows(request) -> list[Row]:
    found = _rows(*request.param)
    assert found, "nothing was compiled"
    return found


def test_no_register_is_spilled(rows):
    check(rows, compiled_code.spills)


def test_shared_memory_fits(rows):
    def violations(row):
        if row["shared"] > row["shared_limit"]:
            yield f"{row['shared']} bytes of shared memory, at most {row['shared_limit']}"

    check(rows, violations)


def test_rows_are_accessed_in_wide_vectors(rows):
    check(rows, lambda row: compiled_code.narrow_accesses(row, limits))


@pytest.mark.parametrize("count", ["barriers", "conversions"])
def test_steady_state_loops_keep_their_limits(rows, count):
    check(rows, lambda row: compiled_code.steady_counts(row, limits, count))


def test_rows_are_in_flight(rows):
    """Copies to shared memory, and tiles that are loaded to registers in advance."""
    check(rows, lambda row: compiled_code.few_buffers(row, limits))


def test_states_are_read_as_often_as_the_limits_say(rows):
    check(rows, lambda row: compiled_code.repeated_reads(row, limits))


def test_all_rows_forward_moves_whole_rows(rows):
    """A cluster reads d elements of each of its rows once, and writes as many."""
    chosen = [row for row in rows if row["kernel"] == "edit_tiles[all]"]
    check(chosen, lambda row: compiled_code.partial_rows(row, row["cluster"]))
