"""Every CUDA source compiles for the supported chips, without spills and within shared memory.

Static assertions in the sources limit dynamic shared memory to that of the smallest chip. The
machine code for sm_90 is read, too: its loads and stores are wide, and its loops wait for little.
What nvcc made is kept in the build folder until the sources change.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="needs the package triton, whose tools read machine code")

from benchmarks.roofline import native, reading

SOURCES = sorted(native.SOURCES.glob("*.cu"))
TARGETS = ("sm_80", "sm_90", "sm_100")
STATIC_SHARED_LIMIT = 48 * 1024


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


@pytest.mark.skipif(native.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.full) for t in TARGETS]
)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_spills(source, target):
    built = native.build(source, target)
    assert native.symbols(built), f"{source.name} has no kernel"
    for name in native.symbols(built):
        code, used, _ = native.machine_code(built, name)
        spilled = reading.total(reading.read(code), "local")
        assert not spilled and not used["STACK"], f"{name}: {spilled} bytes spilled, {used}"
        assert used["SHARED"] <= STATIC_SHARED_LIMIT, f"{name}: {used}"
        if target == "sm_90" and source.stem in CHECKS:
            CHECKS[source.stem](name, [instruction.opcode for instruction in code.instructions])


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
