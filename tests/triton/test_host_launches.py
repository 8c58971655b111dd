"""Runs tests/triton/host_launches.py in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reft_kernels import host_calls

pytest.importorskip("triton", reason="needs the package triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_host_library_makes_the_launches_of_python(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if host_calls.library is None:
        pytest.skip(f"needs the host library: {host_calls.unavailable_reason()}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["tests/triton/host_launches.py"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0 and "skipped" not in last[0], done.stdout[-5000:] + done.stderr
