"""Every Triton kernel compiles for the supported chips, without spills and within shared memory.

tests/triton/aot.py compiles the kernels in a subprocess, because they cannot be compiled under
Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the package triton")

SCRIPT = Path(__file__).with_name("aot.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def _compile(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(rows: list[dict]) -> None:
    assert rows, "nothing was compiled"
    spilling = [row for row in rows if row["spills"]]
    assert not spilling, f"{len(spilling)} of {len(rows)} kernels spill, the first: {spilling[0]}"
    too_large = [row for row in rows if row["shared"] > row["shared_limit"]]
    assert not too_large, (
        f"{len(too_large)} of {len(rows)} kernels need too much shared memory, the first: "
        f"{too_large[0]}"
    )
    registers = 64 * 1024  # of a multiprocessor
    unlaunchable = [
        row
        for row in rows
        if not row["target"].startswith("gfx") and row["registers"] * row["threads"] > registers
    ]
    assert not unlaunchable, f"more registers than a multiprocessor has: {unlaunchable[0]}"
    _check_order_of_stores(rows)


def _check_order_of_stores(rows: list[dict]) -> None:
    """Partial sums are visible before they are counted or added.

    On AMD GPUs a barrier does not wait for other waves' stores, so no kernel may count finished
    programs: partial sums are added by a launch of their own. On NVIDIA GPUs the one atomic of a
    kernel releases what all warps stored before the barrier that precedes it.
    """
    for row in rows:
        if row["target"].startswith("gfx"):
            assert row["atomics"] == 0, f"an atomic in the code of an AMD GPU: {row}"
        else:
            assert row["atomics"] == row["atomics_after_barrier"], f"not after a barrier: {row}"
            counts = row["kernel"].startswith("gradient")
            assert row["atomics"] == int(counts), f"unexpected number of atomics: {row}"
    kernels = {row["kernel"].split("[")[0] for row in rows}
    if any(row["target"].startswith("gfx") for row in rows):
        assert {"sum", "red_sum"} <= kernels, f"no launch adds partial sums: {sorted(kernels)}"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_representative_kernels_compile_without_spills(target):
    _check(_compile("--target", target, "--workers", "1"))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills_at_every_shape(target):
    _check(_compile("--full", "--target", target))
