"""The machine code of ``csrc/cuda`` for sm_90: spills, widths of accesses, barriers of loops.

An instance of a kernel template that accesses rows as vectors has a vector size above 1 among its
arguments. nvcc's cubins are kept in the build folder until the sources change.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the package triton, whose nvdisasm reads machine code")

from benchmarks.roofline import native, reading

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.nvcc() is None, reason="nvcc is not installed"),
]
SOURCES = sorted(native.SOURCES.glob("*.cu"))
VECTOR = 16  # bytes
MOST_BARRIERS = 2
# Templates whose first number is the vector size
VECTORS = ("edit_forward_kernel", "edit_delta_kernel")


@pytest.fixture(params=SOURCES, ids=lambda source: source.stem)
def kernels(request):
    found = native.kernels(request.param)
    assert found, f"{request.param.name} has no kernel"
    return found


def _loops(kernel):
    return reading.walk(kernel.region)


def test_no_register_is_spilled(kernels):
    spilled = {str(k): reading.total(k.region, "local") for k in kernels}
    spilled = {name: count for name, count in spilled.items() if count}
    assert not spilled, f"bytes spilled: {spilled}"


def test_loops_have_few_barriers(kernels):
    most = {str(k): max((loop.barriers for loop in _loops(k)), default=0) for k in kernels}
    most = {name: count for name, count in most.items() if count > MOST_BARRIERS}
    assert not most, f"barriers of a loop, at most {MOST_BARRIERS}: {most}"


def test_vector_instances_load_vectors(kernels):
    for kernel in kernels:
        if kernel.name in VECTORS and kernel.numbers[0] > 1:
            widths = {width for loop in _loops(kernel) for width in loop.loads}
            assert VECTOR in widths, f"{kernel}: loads in loops are {sorted(widths)} bytes wide"


def test_vector_instances_store_vectors(kernels):
    for kernel in kernels:
        if kernel.name == "edit_forward_kernel" and kernel.numbers[0] > 1:
            stores = [loop.stores for loop in _loops(kernel) if loop.stores[VECTOR]]
            assert stores, f"{kernel}: no loop stores {VECTOR} bytes a thread"
            for counts in stores:
                narrow = {w: n for w, n in counts.items() if w < 4}
                assert not narrow, f"{kernel}: stores of bytes a thread: {narrow}"
