"""Every CUDA source compiles for the supported chips, without spills and within shared memory.

Static assertions in the sources limit dynamic shared memory to that of the smallest chip. The
machine code for sm_90 is read, too: its loads and stores are wide, and its loops wait for little.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
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


def _cuobjdump() -> str | None:
    """Return the path of cuobjdump: beside nvcc, on the PATH or in the Triton package."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(NVCC).resolve().parent] if NVCC else []
    if triton is not None:
        folders.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin")
    found = [shutil.which("cuobjdump", path=str(folder)) for folder in folders]
    return next((path for path in [*found, shutil.which("cuobjdump")] if path), None)


def _machine_code(library: Path) -> dict[str, list[str]]:
    """Return the instructions of each kernel, without their operands."""
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is not installed")
    dump = subprocess.run([tool, "-sass", library], capture_output=True, text=True, check=True)
    functions = re.split(r"Function : (\S+)", dump.stdout)[1:]
    instruction = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+ )?([A-Z0-9_.]+)")
    return {
        name: instruction.findall(text)
        for name, text in zip(functions[::2], functions[1::2], strict=True)
    }


def _check_edit_forward(name: str, code: list[str]) -> None:
    if "Li1ELi1E" in name:  # unaligned rows
        return
    stores = [op for op in code if op.startswith("STG") and re.search(r"\.U?(8|16)\b", op)]
    assert not stores, f"{name}: {len(stores)} stores of one element"
    assert "STG.E.128" in code, name
    assert code.count("LDG.E.128") >= 12, f"{name}: {code.count('LDG.E.128')} loads of 128 bits"


def _check_edit_gradient(name: str, code: list[str]) -> None:
    if "Lb1EEEv" not in name:  # unaligned rows
        return
    assert "LDGSTS.E.BYPASS.128" in code and "STG.E.128" in code, name
    assert not any(op in ("STG.E.U16", "STG.E.64") for op in code), name


def _check_edit_tiles(name: str, code: list[str]) -> None:
    loop = code[code.index("UCGABAR_WAIT") + 1 :]
    loop = loop[loop.index("HMMA.16816.F32.BF16" if "bfloat16" in name else "HMMA.16816.F32") :]
    waits = [op for op in loop if op.startswith(("MEMBAR", "CCTL", "UCGABAR"))]
    assert not waits, f"{name}: {waits}"
    tiles = loop.count("STAS.128") // (2 if "Li2ELi" in name else 1)  # the loop is unrolled
    assert tiles == (3 if "Li1ELi1E" in name else 2), f"{name}: {tiles} tiles in flight"
    assert loop.count("BAR.SYNC.DEFER_BLOCKING") == tiles, name
    assert loop.count("LDG.E.128") >= 8 * tiles, f"{name}: {loop.count('LDG.E.128')} loads"
    slow = [op for op in loop if op.startswith("F2F.")]
    assert not slow, f"{name}: {len(slow)} scalar conversions"


CHECKS = {
    "edit_forward": _check_edit_forward,
    "edit_gradient": _check_edit_gradient,
    "edit_tiles": _check_edit_tiles,
}


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
    if target == "90" and source.stem in CHECKS:
        code = _machine_code(tmp_path / "object.o")
        assert set(kernels) <= set(code)
        for name in kernels:
            CHECKS[source.stem](name, code[name])


def test_every_source_is_found():
    assert {source.stem for source in SOURCES} == {
        "edit_delta",
        "edit_delta_tiles",
        "edit_forward",
        "edit_gradient",
        "edit_tiles",
        "orthonormal_backward",
        "orthonormal_forward",
    }
