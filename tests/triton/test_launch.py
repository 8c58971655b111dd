"""Launch configurations of the Triton kernels: grids and tiles for given shapes.

No kernel runs.
"""

from __future__ import annotations

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

pytest.importorskip("triton", reason="needs the package triton")

all_rows = importlib.import_module("reft_kernels.triton.edit_all_rows")
common = importlib.import_module("reft_kernels.triton.common")
forward = importlib.import_module("reft_kernels.triton.edit")
gradient = importlib.import_module("reft_kernels.triton.edit_gradient")
red = importlib.import_module("reft_kernels.triton.red")
split = importlib.import_module("reft_kernels.triton.edit_split")

shapes = {
    "num_rows": st.integers(1, 1 << 20),
    "d": st.integers(1, 16384),
    "rank": st.integers(1, 256),
    "dtype": st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    "second": st.booleans(),
    "amd": st.booleans(),
}


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@given(**shapes)
def test_edit_tiles_are_valid_in_triton(num_rows, d, rank, dtype, second, amd):
    config = forward.edit_config(num_rows, d, rank, dtype, second, amd)
    tile = (config.block_n, config.block_d, config.block_r, config.slices)
    assert all(_is_power_of_two(side) for side in tile)
    assert rank <= config.block_r < 2 * max(rank, common.MIN_DOT)
    assert config.block_d // config.slices >= common.MIN_DOT
    assert config.slices <= config.num_warps
    assert min(config.read_stages, config.write_stages) >= 2


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HOPPER, ADA = 227 * 1024, 99 * 1024  # bytes of shared memory of a program


@pytest.mark.parametrize(
    "d, rank, dtype, shared, amd, exact, rows",
    [
        (1024, 8, BF16, HOPPER, False, False, 32),
        (2048, 8, BF16, HOPPER, False, False, 32),
        (2048, 8, FP16, HOPPER, False, False, 16),
        (1024, 8, FP32, HOPPER, False, False, 16),
        (2048, 8, FP32, HOPPER, False, False, None),
        (4096, 8, BF16, HOPPER, False, True, 16),
        (4096, 8, BF16, HOPPER, False, False, None),
        (4096, 8, FP16, HOPPER, False, True, None),
        (4096, 9, BF16, HOPPER, False, True, None),
        (4000, 8, BF16, HOPPER, False, True, None),
        (5120, 8, BF16, HOPPER, False, True, None),
        (4096, 8, BF16, ADA, False, True, None),
        (1024, 8, BF16, HOPPER, True, True, None),
    ],
)
def test_rows_stay_on_chip_where_their_tile_fits(d, rank, dtype, shared, amd, exact, rows):
    config = all_rows.all_rows_config(d, rank, dtype, shared, amd, exact)
    assert (config and config.block_n) == rows
    if config is not None:
        assert config.tiles * config.block_d >= d > (config.tiles - 1) * config.block_d
        # half of the register file of a multiprocessor
        assert config.block_n * config.tiles * config.block_d * dtype.itemsize <= 128 * 1024
        assert config.block_d // config.slices >= common.MIN_DOT


@given(
    **{k: v for k, v in shapes.items() if k != "num_rows"},
    rows=st.lists(st.integers(100, 10_000), min_size=3, max_size=20),
)
def test_a_change_of_the_number_of_rows_compiles_at_most_two_kernels(
    rows, d, rank, dtype, second, amd
):
    configs = {forward.edit_config(n, d, rank, dtype, second, amd) for n in rows}
    assert len(configs) <= 2


@given(sets=st.integers(1, 64), selected=st.booleans(), **shapes)
def test_gradient_tiles_and_chunks_cover_the_rows(
    sets, selected, num_rows, d, rank, dtype, second, amd
):
    config = gradient.gradient_config(num_rows, d, rank, sets, dtype, second, selected, amd)
    tile = (config.block_n, config.block_d, config.block_r)
    assert all(_is_power_of_two(side) for side in tile) and min(tile[:2]) >= common.MIN_DOT
    assert rank <= config.block_r
    assert 1 <= config.chunks <= -(-num_rows // (4 * config.block_n))
    if num_rows <= gradient.FEW_ROWS:
        assert config.chunks == 1, "few rows need neither partial sums nor counters"


@pytest.mark.parametrize("shared, stages", [(227, 3), (163, 3), (99, 2)])
def test_gradients_of_64_ranks_fit_shared_memory(shared, stages):
    """118,784 bytes with three buffers, more than GPUs of compute capability 8.6 and 8.9 have."""
    config = gradient.gradient_config(8192, 4096, 64, 1, FP32, shared=shared * 1024)
    assert (config.parts, config.num_stages) == (2, stages)


@given(sets=st.integers(1, 64), num_rows=st.integers(1, 1 << 20), d=st.integers(1, 16384))
def test_red_tiles_and_chunks_cover_the_rows(sets, num_rows, d):
    config = red.red_config(num_rows, d, sets)
    assert _is_power_of_two(config.block_n) and _is_power_of_two(config.block_d)
    assert config.block_n * config.block_d <= 4096
    assert 1 <= config.chunks <= -(-num_rows // config.block_n)


def test_launch_configs_depend_on_shapes_alone():
    """Equal calls are launched in the same way, which determinism requires."""
    first = [forward.edit_config(n, 4096, 8, torch.bfloat16) for n in (1, 448, 8192)]
    assert first == [forward.edit_config(n, 4096, 8, torch.bfloat16) for n in (1, 448, 8192)]


def test_few_rows_spread_over_programs_that_share_the_weights():
    """f7+l7 of 32 prompts: more programs would read more bytes of weights than of rows."""
    config = forward.edit_config(448, 4096, 8, torch.bfloat16)
    programs = -(-448 // config.block_n)
    weights, rows = programs * 2 * 8 * 4096 * 4, 3 * 448 * 4096 * 2
    assert programs >= 56 and weights < 1.5 * rows


@pytest.mark.parametrize(
    "n, power", [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (8192, 8192)]
)
def test_next_power_of_two(n, power):
    assert common.next_power_of_2(n) == power


def test_products_stay_on_tensor_cores_where_the_dtype_allows(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETING", False)
    monkeypatch.setattr(common, "IS_AMD", False)
    assert common.dot_precision(torch.bfloat16) is None
    assert common.dot_precision(torch.float16) is None
    assert common.dot_precision(torch.float32) == "tf32x3"
    monkeypatch.setattr(common, "IS_AMD", True)
    assert common.dot_precision(torch.float32) == "ieee"


@given(
    weight_dtype=st.sampled_from((FP32, BF16)), **{k: v for k, v in shapes.items() if k != "second"}
)
def test_split_tiles_cover_the_columns(num_rows, d, rank, dtype, weight_dtype, amd):
    config = split.split_config(num_rows, d, rank, dtype, weight_dtype, 2, amd)
    if config is None:
        return
    assert not amd and num_rows <= split.MOST_ROWS and rank <= config.block_r
    tile = (config.block_n, config.block_d, config.block_r, config.slices)
    assert all(_is_power_of_two(side) for side in tile)
    assert config.width % config.block_d == 0
    assert config.parts * config.width >= d > (config.parts - 1) * config.width
    assert config.block_d // config.slices >= common.MIN_DOT and config.stages >= 2
    column = config.block_n * dtype.itemsize + config.block_r * weight_dtype.itemsize
    assert (config.stages - 1) * config.block_d * column <= 96 * 1024
    assert {split.split_config(n, d, rank, dtype, weight_dtype) for n in (1, 99, 1024)} == {config}


@pytest.mark.parametrize(
    "rows, d, rank, weight_dtype, splits",
    [
        (448, 4096, 64, BF16, True),
        (112, 4096, 32, BF16, True),
        (448, 8192, 32, BF16, True),
        (448, 4096, 32, FP32, True),
        (448, 4096, 16, BF16, False),
        (448, 4096, 8, FP32, False),
        (448, 8192, 8, FP32, False),
        (448, 768, 64, BF16, False),
        (8192, 4096, 64, BF16, False),
        (448, 4096, 65, BF16, False),
    ],
)
def test_large_weights_of_few_rows_are_split(rows, d, rank, weight_dtype, splits):
    config = split.split_config(rows, d, rank, BF16, weight_dtype)
    assert (config is not None) == splits
    if config is not None:
        weights = config.width * config.block_r * weight_dtype.itemsize
        assert weights <= 128 * 1024, "bytes of a matrix that a program reads"
