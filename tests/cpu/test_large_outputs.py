"""Large outputs of the native backend: memory from the pool and non-temporal stores."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import reft_kernels as rk
from reft_kernels import dispatch, host_memory
from tests import budget, inputs
from tests.inputs import Case

_WHY_NOT = dispatch.unsupported_reason("cpu", "edit", "cpu", torch.float32)
pytestmark = [
    pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT)),
    pytest.mark.usefixtures("_cpu_backend"),
]
MIB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture
def _cpu_backend():
    with rk.backend("cpu"):
        host_memory.release()
        yield
        host_memory.release()


def _block(mib: int) -> torch.Tensor:
    return host_memory.empty_like(torch.empty(mib * MIB // 4))


def _spoil_the_pool(like: torch.Tensor) -> None:
    """Fill the memory that the next output of this size receives with NaN."""
    host_memory.empty_like(like).fill_(float("nan"))


def _rows(d: int, dtype: torch.dtype) -> int:
    """Return the smallest number of rows whose output is written with non-temporal stores."""
    return host_memory.SMALLEST_BYTES // (d * dtype.itemsize) + 3


def _both_ways(edit, leaves, grad):
    """Return output and gradients of the edit out of place and in place."""
    results = []
    for inplace in (False, True):
        _spoil_the_pool(grad)
        _spoil_the_pool(grad)

        def run(hidden, inplace=inplace, **weights):
            # both multiplications make tensors that the graph owns, so the edit may be in place
            return edit(hidden * 1, inplace=inplace, **weights) * 1

        results.append(budget.outputs(run, leaves, grad))
    return results


@pytest.mark.parametrize("rank", [3, 12])
# non-temporal stores are used only for rows of whole cache lines
@pytest.mark.parametrize("d", [1024, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edits_equal_the_edits_in_place_bit_for_bit(dtype, d, rank):
    rows = _rows(d, dtype)
    weights = inputs.weights("loreft", Case(d=d, r=rank))
    if dtype == torch.float64:
        weights = budget.cast(weights, dtype)
    leaves = {"hidden": torch.randn(rows, d).to(dtype)} | weights
    out, in_place = _both_ways(rk.loreft, leaves, torch.randn(rows, d).to(dtype))
    for name, tensor in out.items():
        assert torch.equal(tensor, in_place[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_red_equals_red_in_place_bit_for_bit(dtype):
    d = 1024
    rows, acc = _rows(d, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        "hidden": torch.randn(rows, d).to(dtype),
        "scale": torch.randn(d, dtype=acc),
        "bias": torch.randn(d, dtype=acc),
    }
    out, in_place = _both_ways(rk.red, leaves, torch.randn(rows, d).to(dtype))
    for name, tensor in out.items():
        assert torch.equal(tensor, in_place[name]), name


def test_within_the_error_budget():
    budget.check(
        lambda: inputs.draw("loreft", Case((4100,), 1024, 8), torch.float32), torch.float32, draws=1
    )


def test_selected_rows_out_of_place():
    hidden = torch.randn(4200, 1024)
    _spoil_the_pool(hidden)
    weights = inputs.weights("loreft", Case(d=1024, r=4)).values()
    rows = torch.tensor([5, 4199], dtype=torch.int32)
    got = rk.loreft(hidden, *weights, rows=rows)
    want = rk.loreft(hidden.clone(), *weights, rows=rows, inplace=True)
    assert torch.equal(got, want)
    assert host_memory.held() == (18 * MIB, 0)  # 16.4 MiB, rounded up to huge pages


def test_blocks_come_back_and_are_used_again():
    like = torch.empty(4096, 1024)
    first = host_memory.empty_like(like)
    address = first.data_ptr()
    view = first[5:]
    del first
    assert host_memory.held() == (16 * MIB, 0), "a view keeps its block"
    del view
    assert host_memory.held() == (0, 16 * MIB)
    again = host_memory.empty_like(like)
    assert again.data_ptr() == address and host_memory.held() == (16 * MIB, 0)
    assert again.shape == like.shape and again.dtype == like.dtype and again.is_contiguous()
    other = host_memory.empty_like(like)
    assert other.data_ptr() != address
    del again, other
    assert host_memory.held() == (0, 32 * MIB)
    host_memory.release()
    assert host_memory.held() == (0, 0)


def test_a_block_is_reused_for_slightly_smaller_outputs():
    _block(64)
    assert host_memory.held() == (0, 64 * MIB)
    close = _block(57)
    assert host_memory.held() == (64 * MIB, 0)
    del close
    small = _block(32)
    assert host_memory.held() == (32 * MIB, 64 * MIB)
    assert small.nbytes == 32 * MIB


def test_transposed_hidden_states_get_dense_outputs():
    hidden = torch.randn(1024, 4200).mT
    _spoil_the_pool(hidden)
    weights = inputs.weights("loreft", Case(d=1024, r=4)).values()
    out = rk.loreft(hidden, *weights)
    assert out.is_contiguous() and torch.equal(out, rk.loreft(hidden.contiguous(), *weights))


def test_small_outputs_and_other_backends_are_left_to_torch():
    small, large = torch.empty(4, 1024), torch.empty(4200, 1024)
    host_memory.empty_like(small)
    assert host_memory.held() == (0, 0)
    with rk.backend("torch"):
        host_memory.empty_like(large)
        assert host_memory.held() == (0, 0)
        host_memory.release()
    assert host_memory.held() == (0, 0)


LIMITED = """
import torch
from reft_kernels import host_memory
blocks = [host_memory.empty_like(torch.empty(mib << 18)) for mib in (16, 32, 16, 64)]
while blocks:
    del blocks[0]
    print(*(bytes >> 20 for bytes in host_memory.held()), end="; ")
"""


def _run(script: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "REFT_KERNELS_BACKEND": "cpu", **environment}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, env=env
    )


def test_over_the_limit_the_oldest_block_is_freed():
    done = _run(LIMITED, REFT_KERNELS_HOST_POOL_MB="50")  # larger blocks are freed at once
    assert done.stdout == "112 16; 80 48; 64 48; 0 48; ", done.stderr


def test_a_limit_of_zero_leaves_outputs_to_torch():
    done = _run(LIMITED, REFT_KERNELS_HOST_POOL_MB="0")
    assert done.stdout == "0 0; 0 0; 0 0; 0 0; ", done.stderr


def test_the_limit_can_be_changed():
    before = host_memory.limit()
    try:
        used, _ = _block(64), _block(32)
        del _
        assert host_memory.held() == (64 * MIB, 32 * MIB)
        host_memory.set_limit(0)
        assert host_memory.held() == (64 * MIB, 0) and host_memory.limit() == 0
        _block(32)
        del used
        assert host_memory.held() == (0, 0)
        with pytest.raises(ValueError, match="mib: got -1, expected zero or more"):
            host_memory.set_limit(-1)
    finally:
        host_memory.set_limit(before)


def test_an_invalid_limit_raises():
    done = _run(LIMITED, REFT_KERNELS_HOST_POOL_MB="many")
    assert (
        "REFT_KERNELS_HOST_POOL_MB: got 'many', expected a whole number of MiB, zero or more"
        in done.stderr
    )


def test_the_pool_from_many_threads():
    def work(number):
        for _ in range(20):
            some = _block(16)[::1024]
            some[:] = number
            if not (some == number).all():
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert host_memory.held().used == 0


def test_a_tensor_may_outlive_everything():
    done = _run(
        "import torch\nfrom reft_kernels import host_memory\nkept = "
        "host_memory.empty_like(torch.empty(5000, 1024))"
    )
    assert done.returncode == 0, done.stderr


def test_outputs_are_saved_and_loaded_like_any_other(tmp_path):
    from safetensors.torch import load_file, save_file

    out = host_memory.empty_like(torch.empty(4200, 1024)).normal_()
    save_file({"out": out}, tmp_path / "out.safetensors")
    torch.save(out, tmp_path / "out.pt")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], out)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), out)
