"""Runs the tests of the host library in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reft_kernels import dispatch, host_calls

pytest.importorskip("triton", reason="needs the package triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_host_library_makes_the_launches_of_python(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    if host_calls.library is None:
        folder = Path(sys.executable).parent  # where pip puts ninja
        environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, str(ROOT / "csrc" / "build.py"), "--host", "--out"]
        command += [str(tmp_path), "--objects", str(tmp_path / "objects")]
        built = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if "not found" in built.stderr:
            pytest.skip(f"the host library: {built.stderr.strip().splitlines()[-1]}")
        assert built.returncode == 0, built.stderr
        environment[host_calls.LIBRARY_VARIABLE] = str(tmp_path / host_calls.file_name())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["tests/triton/host_launches.py"]
        + ["tests/test_host_calls.py"] * dispatch.serves_cpu_natively,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1:]
    assert done.returncode == 0 and "skipped" not in last[0], done.stdout[-5000:] + done.stderr
