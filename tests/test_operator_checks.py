"""The operators' own door: wrong arguments raise before anything is written, whoever calls them
and on whatever backend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reft_kernels as rk
from reft_kernels import dispatch
from reft_kernels.parametrization import MAX_RANK

ROOT = Path(__file__).resolve().parent.parent
OPS = torch.ops.reft_kernels
NATIVE = dispatch.unsupported_reason("cpu", "edit", "cpu", torch.float32) is None
BACKENDS = ["torch", "cpu"] if NATIVE else ["torch"]
M, D, R = 6, 8, 3


@pytest.fixture(params=BACKENDS)
def backend(request):
    with rk.backend(request.param):
        yield request.param


def arguments(**changed):
    """A valid call of ``edit_`` on rows 1 and 4, with some arguments changed."""
    found = {
        "hidden": torch.randn(M, D),
        "rows": torch.tensor([1, 4], dtype=torch.int32),
        "weight_ids": None,
        "read": torch.randn(R, D),
        "read_bias": torch.randn(R),
        "write": torch.randn(R, D),
        "subtract_bias": None,
        "coeff": None,
        "subtract_projection": False,
        "activation": "linear",
        "save": True,
    }
    return {**found, **changed}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


LARGE = MAX_RANK + 344  # rank 600 ended the process
WRONG = {
    "int64 rows": ({"rows": torch.tensor([1, 4])}, "rows: .*int64.*int32"),
    "rows beyond the end": ({"rows": int32(1, M)}, "rows: got values from 1 to 6"),
    "negative rows": ({"rows": int32(-2, 1)}, "rows: got values from -2"),
    "repeated rows": ({"rows": int32(4, 4)}, "rows: row 4 stands more than once"),
    "rank 600 with coeff": (
        {
            "read": torch.randn(LARGE, D),
            "write": torch.randn(LARGE, D),
            "read_bias": torch.randn(LARGE),
            "coeff": torch.ones(2, LARGE),
        },
        "write: .*600",
    ),
    "no sets": (
        {
            "write": torch.randn(2, R, D),
            "read": torch.randn(2, R, D),
            "read_bias": torch.randn(2, R),
        },
        "write",
    ),
    "sets out of range": (
        {
            "write": torch.randn(2, R, D),
            "read": torch.randn(2, R, D),
            "read_bias": torch.randn(2, R),
            "weight_ids": int32(0, 2),
        },
        "weight_ids: got values from 0 to 2",
    ),
    "activation": ({"activation": "swish9"}, "activation"),
    "coeff of other rows": ({"coeff": torch.ones(3, R)}, "coeff"),
    "read of another rank": ({"read": torch.randn(R + 1, D)}, "read"),
    "integers": ({"hidden": torch.ones(M, D, dtype=torch.int32)}, "hidden"),
    "three dimensions": ({"hidden": torch.randn(2, 3, D)}, "hidden"),
    "expanded": ({"hidden": torch.randn(1, D).expand(M, D)}, "hidden"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_arguments_raise_and_nothing_is_written(name, backend):
    changed, message = WRONG[name]
    args = arguments(**changed)
    before = args["hidden"].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        OPS.edit_(*args.values())
    assert torch.equal(args["hidden"], before)


def test_a_backward_takes_what_its_forward_made(backend):
    args = arguments()
    out, saved_input, u, z = OPS.edit(*args.values())
    rest = [args["rows"], None, args["read"], args["write"], None, False, "linear"]
    OPS.edit_backward(out, saved_input, u, z, *rest, True, True)
    for wrong in (
        (saved_input[:1], u, z),
        (saved_input, u[:, :1], z),
        (saved_input.double(), u, z),
    ):
        with pytest.raises((TypeError, ValueError), match="saved_input|u"):
            OPS.edit_backward(out, *wrong, *rest, True, True)


@pytest.mark.skipif(not NATIVE, reason="the native library of this package is not built here")
@pytest.mark.parametrize(
    "rows", [torch.tensor([1, 4]), int32(1, M), int32(-2, 1)], ids=["int64", "beyond", "negative"]
)
def test_the_native_library_has_a_door_of_its_own(rows):
    hidden, write = torch.randn(M, D), torch.randn(R, D)
    before = hidden.clone()
    with pytest.raises(RuntimeError, match="rows"):
        torch.ops.reft_kernels_cpu.edit.default(
            hidden,
            hidden,
            rows,
            None,
            torch.randn(R, D),
            torch.randn(R),
            write,
            None,
            None,
            False,
            0,
            None,
            None,
            None,
        )
    assert torch.equal(hidden, before)


FUZZ = {
    "torch": ["--backend", "torch", "--cases", "4000"],
    "cpu": ["--backend", "cpu", "--first", "4000", "--cases", "6000"],
    "native library": ["--backend", "cpu", "--first", "20000", "--cases", "2000", "--unguarded"],
    "triton, interpreted": ["--backend", "triton", "--first", "30000", "--cases", "150"],
}


@pytest.mark.parametrize("name", list(FUZZ))
def test_twelve_thousand_mutated_calls(name):
    """A case that ends the process is named by the last line that it leaves."""
    if not NATIVE and name in ("cpu", "native library"):
        pytest.skip("the native library of this package is not built here")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_operators", *FUZZ[name]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, (run.stdout[-300:], run.stderr[-3000:])
    assert "'right'" in run.stdout or "--unguarded" in FUZZ[name]
