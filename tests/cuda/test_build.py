"""Every CUDA source compiles for the supported chips, without spills and within shared memory.

Static assertions in the sources limit dynamic shared memory to that of the smallest chip.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
_spec = importlib.util.spec_from_file_location("native_build", CSRC / "build.py")
_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_build)
NVCC = _build.nvcc()
TARGETS = ("80", "90", "100")
STATIC_SHARED_LIMIT = 48 * 1024


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, target, tmp_path):
    command = [
        NVCC,
        "-std=c++17",
        "-O3",
        "-Xptxas",
        "-v",
        f"-gencode=arch=compute_{target},code=sm_{target}",
        "-c",
        str(source),
        "-o",
        str(tmp_path / "object.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    report = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)'", report)
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", report)]
    assert kernels and len(spills) == 2 * len(kernels), "ptxas reported nothing"
    assert not any(spills), f"spills in {source.name}: {report[-4000:]}"
    assert max(shared, default=0) <= STATIC_SHARED_LIMIT


def test_every_source_is_found():
    assert {source.stem for source in SOURCES} == {
        "edit_delta",
        "edit_forward",
        "edit_gradient",
        "orthonormal_backward",
        "orthonormal_forward",
    }
