"""The number of rows decides neither the types nor the constants of a kernel.

A training run meets batches of many sizes, and a compilation takes a second in the middle of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

SCRIPT = Path(__file__).with_name("compilations.py")


def test_a_change_of_the_number_of_rows_compiles_at_most_two_kernels():
    """One for few rows and one for many, for 17 numbers of rows from 100 to 10,000."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 4
    for case, counts in results.items():
        assert counts["gradient_kernel"] and counts["delta_kernel"]
        more = {kernel: count for kernel, count in counts.items() if count > 2}
        assert not more, f"{case}: compiled more than twice: {more}"
