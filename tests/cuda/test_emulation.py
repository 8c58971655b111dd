"""CUDA kernels on a CPU, compiled against an emulation of the execution model, with race detection.

tests/cuda/emulation has the emulation. It is built for sm_80, which has cooperative grids, and for
sm_90, which has clusters. Tests marked ``full`` run everything for both; by default, tests run for
both only where they differ.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reft_kernels import cuda
from tests.cuda.emulation import build

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "build" / "emulation"
# the tests of the kernels, and those directly in tests/; markers choose among them
KERNELS, ENGINE = "tests/cuda", "tests"
MAP_CASES = ("householder", "cayley")  # cases of sanitized.cpp


def _run(*command: str | Path, **environment: str | None) -> subprocess.CompletedProcess:
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, env=env
    )


def _emulated(arch: int, *command: str, **environment: str) -> subprocess.CompletedProcess:
    library = build.build_library(arch)
    # operators without a CUDA kernel use the torch backend, not Triton's interpreter
    return _run(
        sys.executable,
        *command,
        REFT_KERNELS_CUDA_LIBRARY=str(library),
        TRITON_INTERPRET="0",
        **environment,
    )


def _tests(arch: int, *selection: str, **environment: str) -> None:
    # of the folder that is named, nothing below it is collected
    options = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "norecursedirs=*")
    done = _emulated(arch, "-m", "pytest", *options, *selection, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout


# tests of the kernels and of the public functions


@pytest.mark.slow
def test_kernels_with_clusters():
    _tests(900, KERNELS, "-m", "kernels and not emulation_full")


@pytest.mark.slow
def test_kernels_with_a_cooperative_grid():
    _tests(800, KERNELS, "-m", "kernels and maps")


@pytest.mark.slow
def test_engine():
    """The tests of the public functions pass with threads in random order."""
    _tests(900, ENGINE, "-m", "engine and emulated", REFT_EMULATION_ORDER="random")


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_everything(arch, order):
    _tests(arch, KERNELS, "-m", "kernels", REFT_EMULATION_ORDER=order)
    _tests(arch, ENGINE, "-m", "engine and emulated", REFT_EMULATION_ORDER=order)


# selection of the emulation

ASK = """
import torch
from reft_kernels import cuda
print(*(cuda.unsupported_reason("edit", device, torch.float32) for device in ("cpu", "cuda")), sep="\\n")
"""


def test_the_emulation_serves_cpu_tensors_alone():
    done = _emulated(900, "-c", ASK)
    assert done.stdout.splitlines() == ["None", "the emulated CUDA kernels serve CPU tensors"], (
        done.stderr
    )
    if not cuda.emulated():
        assert (
            cuda.unsupported_reason("edit", "cpu", torch.float32)
            == "the CUDA kernels serve tensors on NVIDIA GPUs"
        )


def test_a_missing_or_invalid_library_is_reported(tmp_path):
    absent = _run(sys.executable, "-c", ASK, REFT_KERNELS_CUDA_LIBRARY=str(tmp_path / "none.so"))
    assert (
        absent.stdout.count("REFT_KERNELS_CUDA_LIBRARY: got") == 2
        and "expected an existing file" in absent.stdout
    )
    (tmp_path / "text.so").write_text("no library")
    damaged = _run(sys.executable, "-c", ASK, REFT_KERNELS_CUDA_LIBRARY=str(tmp_path / "text.so"))
    assert damaged.stdout.count("text.so does not load: ") == 2


def test_a_failed_launch_is_an_error_of_the_call():
    script = """
import torch
from reft_kernels import cuda
assert cuda.emulated()
none, rows = torch.zeros(0), torch.zeros(1, dtype=torch.int32)
call = torch.ones(2, 4), None, torch.ones(1, 4), rows, rows, None, torch.ones(70000, 1, 4), torch.ones(1, 2, 8), False, 0
torch.ops.reft_kernels_cuda.edit_gradient(*call, none, torch.ones(70000, 1), torch.ones(70000, 1, 4), none)
"""
    done = _emulated(900, "-c", script)
    assert "reft_kernels_cuda::edit_gradient: a launch of 2 x 70000 x 1 blocks" in done.stderr, (
        done.stderr
    )


# sanitizers


@functools.cache
def _fixed_addresses() -> tuple[str, ...]:
    """Disable address space randomization, which ThreadSanitizer may not support."""
    setarch = shutil.which("setarch")
    return (setarch, "-R") if setarch and _run(setarch, "-R", "true").returncode == 0 else ()


def _program(
    name: str, arch: int, sanitizer: str, *arguments: str, kernels: bool
) -> subprocess.CompletedProcess:
    compiler = build.native.compiler()
    needed = {"": [], "address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}[sanitizer]
    for library in needed:
        if not os.path.isabs(_run(*compiler.split(), f"-print-file-name={library}").stdout.strip()):
            pytest.skip(f"{compiler} has no {library}")
    program = build.build_program(
        build.HERE / f"{name}.cpp", arch, sanitizer, PROGRAMS, kernels=kernels
    )
    done = _run(
        *(_fixed_addresses() if sanitizer == "thread" else ()),
        program,
        *arguments,
        ASAN_OPTIONS="detect_leaks=0",  # a failed launch leaves a thread behind
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
        TSAN_OPTIONS="report_signal_unsafe=0",
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip(
            "this kernel randomises addresses beyond what ThreadSanitizer supports, and forbids "
            "setarch -R"
        )
    return done


def _clean(arch: int, sanitizer: str, *arguments: str) -> None:
    done = _program("sanitized", arch, sanitizer, *arguments, kernels=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "Sanitizer" not in output and ", 0 failures" in output, output[
        :6000
    ]


@pytest.mark.slow
def test_no_access_out_of_bounds_and_no_undefined_behaviour():
    _clean(900, "address")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "cases"), [(900, ()), (800, MAP_CASES)], ids=["clusters", "cooperative grid"]
)
def test_no_races(arch, cases):
    _clean(arch, "thread", "--once", *cases)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("arch", build.ARCHITECTURES)
def test_sanitizers_report_nothing_in_any_order(arch, sanitizer):
    _clean(arch, sanitizer)


# faults that must be reported: case of faults.cpp, sanitizer, part of the output

_RACE, _ASAN = "ThreadSanitizer: data race", "AddressSanitizer: "
FAULTS = [
    ("missing barrier", "thread", _RACE),
    ("missing second barrier", "thread", _RACE),
    ("shuffle as barrier", "thread", _RACE),
    ("blocks write one place", "thread", _RACE),
    ("cluster without a first barrier", "thread", _RACE),
    ("cluster without a last barrier", "thread", _RACE),
    ("grid without a barrier", "thread", _RACE),
    (
        "cluster without a last barrier",
        "",
        "touched shared memory of block (0, 0, 0), which has ended",
    ),
    ("divergent barrier", "", "divergent threads, none can go on: 40 at __syncthreads()"),
    ("two barriers", "", "divergent __syncthreads()"),
    ("partial shuffle", "", "32 at a warp's shuffle"),
    ("overrun", "", "touched memory outside the dynamic shared memory of block (0, 0, 0)"),
    ("far overrun", "", "touched memory outside the dynamic shared memory of block (0, 0, 0)"),
    ("overrun by a few bytes", "", "wrote outside its 252 bytes of dynamic shared memory"),
    ("overrun by a few bytes", "address", _ASAN),
    ("overrun of global memory", "address", _ASAN + "heap-buffer-overflow"),
    ("uninitialised", "", "nan"),
    ("misaligned", "", "made a misaligned access"),
    ("misaligned", "address", "runtime error: reference binding to misaligned address"),
    ("copy without a wait", "", "nan"),
    ("transfer without a wait", "", "nan"),
    ("transfer without a wait", "thread", _RACE),
    ("transfer of too few bytes", "", "128 at a wait for transfers"),
    ("grid barrier in a plain launch", "", "of a launch that is not cooperative"),
    ("no threads", "", "blocks of 0 threads"),
    ("too many threads", "", "blocks of 1056 threads"),
    ("too much shared memory", "", "the kernel is granted 49152"),
    ("blocks that are no whole clusters", "", "3 blocks in clusters of 2"),
    ("a cluster of sixteen", "", "16 blocks in clusters of 16"),
    ("a cooperative grid that is not resident", "", "17 blocks on 16 processors"),
]


@pytest.mark.parametrize(("case", "sanitizer", "output"), FAULTS)
def test_a_fault_is_reported(case, sanitizer, output):
    done = _program("faults", 900, sanitizer, case, kernels=False)
    assert done.returncode != 0 and output in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("sanitizer", ["", "address", "thread"])
@pytest.mark.parametrize(
    "case", ["sound", "warp barrier", "sound copy", "sound cluster", "sound transfer", "sound grid"]
)
def test_a_correct_kernel_is_not_reported(case, sanitizer, order):
    done = _program("faults", 900, sanitizer, case, order, kernels=False)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stdout + done.stderr


def test_half_precision_rounds_as_in_torch():
    """Conversions of every half-precision number, and of fp32 numbers near rounding boundaries."""
    numbers = (
        np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    )
    ties = np.arange(0, 2**32, 0x800, dtype=np.uint64)[:: 2**5 + 1].astype(np.uint32)
    given = np.concatenate(
        [
            numbers,
            ties,
            ties + 1,
            ties - 1,
            np.uint32([0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001]),
        ]
    )
    program = build.build_program(build.HERE / "conversions.cpp", 900, "", PROGRAMS, kernels=False)
    made = subprocess.run(
        [str(program)], input=given.tobytes(), capture_output=True, check=True
    ).stdout
    rounded = np.frombuffer(made[: 4 * len(given)], dtype=np.uint16).reshape(-1, 2)
    values = torch.from_numpy(given.view(np.float32).copy())
    every = torch.from_numpy(
        np.frombuffer(made[4 * len(given) :], dtype=np.float32).reshape(2, -1).copy()
    )
    for k, dtype in enumerate((torch.bfloat16, torch.float16)):
        ours = torch.from_numpy(rounded[:, k].copy().view(np.int16)).view(dtype)
        torch.testing.assert_close(ours, values.to(dtype), rtol=0, atol=0, equal_nan=True)
        widened = torch.arange(2**16).to(torch.int32).to(torch.int16).view(dtype).float()
        torch.testing.assert_close(every[k], widened, rtol=0, atol=0, equal_nan=True)
