"""The machine code of the Triton kernels at the shapes that matter: widths, barriers, pipelining.

aot.py records, compiles, disassembles and executes the kernels in a subprocess. limits.py has limits
for each kernel; tests/compiled_code.py says what violates them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from tests import compiled_code
from tests.compiled_code import Row, check, run
from tests.triton.limits import limits

SCRIPT = Path(__file__).with_name("aot.py")
pytestmark = pytest.mark.slow


@functools.cache
def _rows(target: str, full: bool) -> list[Row]:
    return run(SCRIPT, "--code", "--target", target, *(["--full"] if full else ["--workers", "1"]))


@pytest.fixture(params=compiled_code.PARAMS, scope="module")
def rows(request) -> list[Row]:
    found = _rows(*request.param)
    assert found, "nothing was compiled"
    return found


def test_no_register_is_spilled(rows):
    check(rows, compiled_code.spills)


def test_rows_are_accessed_in_wide_vectors(rows):
    check(rows, lambda row: compiled_code.narrow_accesses(row, limits))


@pytest.mark.parametrize("count", ["barriers", "conversions"])
def test_steady_state_loops_keep_their_limits(rows, count):
    """Few barriers, and no conversions of weights that arrive in the form of the products."""
    check(rows, lambda row: compiled_code.steady_counts(row, limits, count))


def test_copies_are_in_flight(rows):
    check(rows, lambda row: compiled_code.few_buffers(row, limits))


def test_states_are_read_as_often_as_the_limits_say(rows):
    check(rows, lambda row: compiled_code.repeated_reads(row, limits))


def test_all_rows_forward_moves_whole_rows(rows):
    """One program reads d elements of each of its rows, and writes as many."""
    forward = ("edit[all", "edit_all_rows[all")
    chosen = [row for row in rows if row["kernel"].startswith(forward)]
    check(chosen, compiled_code.partial_rows)
