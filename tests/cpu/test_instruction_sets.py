"""Every instruction set of the native library is within the error budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reft_kernels import cpu

ROOT = Path(__file__).parents[2]

SCRIPT = """
import torch
import reft_kernels as rk
from reft_kernels import cpu
from tests import budget, inputs, plain
from tests.inputs import Case

assert cpu.instruction_set() == {isa!r}, (cpu.instruction_set(), cpu.unsupported_reason("edit", "cpu", torch.float32))
rk.set_backend("cpu")
torch.set_num_threads(1)
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for name in plain.MEMBERS:
        for case in (Case((37,), 83, 5), Case((9, 11), 70, 18, rows=40, sets=2, coeff=True, inplace=True)):
            # in fp64 the reference has no error to compare with: there the budget of fp32 tells right from wrong
            budget.check(lambda: inputs.draw(name, case, dtype), torch.float32 if dtype == torch.float64 else dtype)
torch.manual_seed(1)
extremes = torch.tensor([0.0, -0.0, 1e-8, 5.9e-8, 6.1e-5, 65504.0, 65519.9, 65520.0, 1e30, -3e38, torch.inf, torch.nan])
for dtype in (torch.float16, torch.bfloat16):  # conversions: every exponent, subnormals, overflow, infinity and NaN
    x = torch.cat([extremes, -extremes, torch.randn(4096) * 2.0 ** torch.randint(-30, 18, (4096,))]).to(dtype)
    bias = torch.randn(x.numel()) * x.float().nan_to_num(0, 1, 1)
    got = rk.red(x[None], torch.ones(x.numel()), bias)
    torch.testing.assert_close(got[0], (x.float() + bias).to(dtype), rtol=0, atol=0, equal_nan=True)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):  # large outputs are streamed past the caches
    hidden = torch.randn(2**24 // (512 * dtype.itemsize), 512).to(dtype)
    weights = inputs.weights("loreft", Case(d=512, r=8)).values()
    assert torch.equal(rk.loreft(hidden, *weights), rk.loreft(hidden.clone(), *weights, inplace=True)), dtype
    scale, bias = torch.randn(2, 512)
    assert torch.equal(rk.red(hidden, scale, bias), rk.red(hidden.clone(), scale, bias, inplace=True)), dtype
for name in ("householder", "cayley"):
    R = getattr(rk, name)(torch.randn(2, 1031, 13) / 32)
    assert rk.orthonormality_error(R) <= 1e-6
print("within budget")
"""


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_within_the_error_budget(isa):
    refusal = (
        torch.ops.reft_kernels_cpu.isa_unsupported_reason(isa)
        if cpu.instruction_set()
        else "the library is off"
    )
    if refusal:
        pytest.skip(f"instruction set {isa}: {refusal}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(isa=isa)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "REFT_KERNELS_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "within budget", done.stderr[-3000:]


def test_an_unknown_one_is_refused():
    ask = (
        "import torch; from reft_kernels import cpu; print(cpu.unsupported_reason('edit', 'cpu', "
        "torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "REFT_KERNELS_CPU_ISA": "mmx", "PYTHONPATH": str(ROOT)},
    )
    assert (
        done.stdout.strip()
        == "REFT_KERNELS_CPU_ISA: got 'mmx', it is not one of avx512bf16, avx512, avx2, portable"
    ), done.stderr
