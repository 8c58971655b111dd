"""Exhaustive tests are left out, whatever else is chosen, until they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACE = "tests/convergence/test_orthonormality.py"  # has slow tests, one of them full


def _collected(*options: str) -> tuple[set[str], set[str]]:
    """The tests that are chosen: the full ones, and all others."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--strict-markers",
        "--collect-only",
        "-q",
        PLACE,
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 5), done.stdout + done.stderr
    found = {line for line in done.stdout.splitlines() if "::" in line}
    exhaustive = {line for line in found if "1024-16-10000" in line}
    return exhaustive, found - exhaustive


@pytest.mark.parametrize(
    ("options", "full", "others"),
    [
        ((), False, True),
        (("-m", "slow"), False, False),
        (("-m", "not gpu"), False, True),
        (("--full",), True, True),
        (("--full", "-m", "slow"), True, False),
        (("-m", "full"), True, False),
        (("-m", "full or not full"), True, True),
    ],
)
def test_full_is_asked_for(options, full, others):
    assert tuple(map(bool, _collected(*options))) == (full, others)
