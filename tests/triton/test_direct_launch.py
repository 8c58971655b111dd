"""Direct launches choose the same compiled kernel as Triton's own ``kernel[grid]``.

Kernels are compiled for a GPU without one (:mod:`tests.triton.fake_gpu`); none runs, except in the
interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

pytest.importorskip("triton", reason="needs the package triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks import fake_gpu

launch = importlib.import_module("reft_kernels.triton.launch")
common = importlib.import_module("reft_kernels.triton.common")


def _add(x, y, out, num_rows, d, stride, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + n * stride, mask=n < num_rows * d, other=0.0).to(tl.float32)
    if y is not None:
        value += tl.load(y + n * stride, mask=n < num_rows * d, other=0.0).to(tl.float32)
    tl.store(out + n * stride, value * SCALE, mask=n < num_rows * d)


def _kernel() -> JITFunction:
    """Return the kernel for compilation, also where ``triton.jit`` returns an interpreted one."""
    return JITFunction(_add, do_not_specialize=["num_rows"])


def _bound(kernel=None, scale=1.0) -> launch.BoundKernel:
    constants = {"SCALE": scale, "BLOCK": 16}
    return launch.BoundKernel(kernel or _kernel(), constants, {"num_warps": 1})


_CORE = dict(vars(tl.core))  # read before any test runs a kernel


@pytest.fixture(autouse=True)
def _compiled_language(monkeypatch, tmp_path):
    """Undo what Triton's interpreter leaves in its language after a kernel that calls ``tl.sum``.

    An empty cache makes every test compile, on a machine that ran them before too.
    """
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    for name, value in _CORE.items():
        monkeypatch.setattr(tl.core, name, value)


@pytest.fixture
def gpu():
    with fake_gpu.installed() as fake:
        yield fake


def _tensor(dtype=torch.float32, offset=0) -> torch.Tensor:
    """Return a tensor whose address is ``offset`` elements past a multiple of 16 bytes."""
    buffer = torch.zeros(64, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    return buffer[offset:]


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_tensors = st.tuples(st.sampled_from(_DTYPES), st.integers(0, 8))
_integers = st.sampled_from((0, 1, 2, 3, 8, 15, 16, 17, 33, 48, -1, -15, -16, 2**31 - 1, 2**31))
_wide = st.one_of(_integers, st.sampled_from((2**31 + 1, 2**31 + 16, -(2**31), -(2**31) - 1)))
_calls = st.tuples(
    _tensors, st.one_of(st.none(), _tensors), _tensors, _wide, _wide, _wide, st.booleans()
)
_TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Sized(torch.Tensor):
    """A tensor that reports a storage of 3 GB; allocating it would need the memory."""

    def untyped_storage(self):
        class Storage:
            def size(self):
                return 3 << 30

            nbytes = size

        return Storage()


def _arguments(call):
    *tensors, num_rows, d, stride, large = call
    tensors = [None if t is None else _tensor(*t) for t in tensors]
    if large:
        tensors[0] = tensors[0].as_subclass(_Sized)
    return tuple(tensors), (num_rows, d, stride)


def _key(bound, tensors, integers):
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    return launch.specialization_key(bound, -1, tensors, pointers, integers)


@pytest.mark.parametrize("target", _TARGETS)
def test_keys_are_as_fine_as_tritons_specialization(target):
    """Calls with equal keys are specialized equally by Triton's own binder."""
    with fake_gpu.installed(_TARGETS[target]):
        bound = _bound()
        binder = bound.kernel.create_binder()[-1]
        known = {}

        @given(_calls)
        def check(call):
            tensors, integers = _arguments(call)
            key = _key(bound, tensors, integers)
            chosen = str(binder(*tensors, *integers, **bound.constants)[1])
            assert known.setdefault(key, chosen) == chosen, (key, call)

        # neighbouring values that one specialization serves must not hide one another
        for d in (1, 2, 15, 16, 17, 32, 2**31 - 1, 2**31, 2**31 + 16, 2**63):
            for stride in (1, 3, 16, 2**31 + 1):
                for offset in range(9):
                    x, y = (torch.float16, offset), (torch.float16, 0)
                    check.hypothesis.inner_test((x, None, y, 5, d, stride, False))
                    for large in (False, True):
                        check.hypothesis.inner_test((y, x, y, 2**31, d, stride, large))
        check()
        assert len(set(known.values())) > 50


def test_calls_of_one_specialization_share_a_key(gpu):
    """The numbers of rows and other multiples of 16 do not make new entries."""
    bound = _bound()
    x, y = _tensor(), _tensor(offset=4)
    keys = {_key(bound, (x, None, y), (n, d, 1)) for n in (1, 2, 16, 448, 8192) for d in (16, 4096)}
    assert len(keys) == 1
    assert len({_key(bound, (x, None, y), (1, d, 3)) for d in (2, 3, 17, 1000001)}) == 1


VARIANTS = [
    ((torch.float32, 0), None, (14, 64, 1)),
    ((torch.float32, 0), (torch.float32, 0), (14, 64, 1)),
    ((torch.float32, 1), None, (14, 64, 1)),  # misaligned
    ((torch.float32, 1), (torch.float32, 0), (14, 64, 1)),
    ((torch.float32, 0), (torch.float32, 1), (14, 64, 1)),
    ((torch.bfloat16, 0), None, (14, 64, 1)),
    ((torch.float32, 0), None, (14, 1, 1)),  # d = 1
    ((torch.float32, 0), None, (14, 64, 16)),
    ((torch.float32, 0), None, (14, 64, 3)),
    ((torch.float32, 0), None, (1, 64, 1)),  # the number of rows is not specialized
    ((torch.float32, 0), None, (2**31, 64, 1)),
]


def test_launches_the_kernel_that_triton_would(gpu):
    bound = _bound()
    out = _tensor()
    calls = [
        ((_tensor(*x), None if y is None else _tensor(*y), out), integers)
        for x, y, integers in VARIANTS
    ]
    for tensors, integers in calls * 2:  # the first round compiles
        launch.launch(bound, (3,), tensors, integers)
    direct = gpu.launches[len(calls) :]
    gpu.launches = []
    for tensors, integers in calls:
        bound.kernel[(3,)](*tensors, *integers, **bound.constants, **bound.options)
    assert len(gpu.loaded) == len({e.function for e in direct}) == len(VARIANTS) - 1
    for mine, tritons, (tensors, integers) in zip(direct, gpu.launches, calls, strict=True):
        assert (mine.function, mine.grid, mine.stream) == (tritons.function, (3, 1, 1), 7)
        assert mine.arguments[3:] == tritons.arguments[3:] == (*integers, 1.0, 16)
        assert mine.arguments[:3] == tuple(0 if t is None else t.data_ptr() for t in tensors)


def test_configurations_do_not_share_kernels(gpu):
    kernel, out = _kernel(), _tensor()
    for bound in (_bound(kernel, 1.0), _bound(kernel, 2.0)):
        for _ in range(2):
            launch.launch(bound, (1, 2, 3), (out, None, out), (14, 64, 1))
    functions = [entry.function for entry in gpu.launches]
    assert functions == [1, 1, 2, 2] and gpu.launches[-1].grid == (1, 2, 3)


def test_stream_is_read_at_each_launch(gpu):
    bound, out = _bound(), _tensor()
    for stream in (7, 8, 9):
        gpu.stream = stream
        launch.launch(bound, (1,), (out, None, out), (14, 64, 1))
    assert [entry.stream for entry in gpu.launches] == [7, 8, 9]


def test_device_of_the_tensors_is_current_during_a_launch(gpu, monkeypatch):
    current, entered = [5], []

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(launch, "_current_device", lambda: current[-1])
    bound, out = _bound(), _tensor()
    for _ in range(2):
        launch.launch(bound, (1,), (out, None, out), (14, 64, 1))
    assert entered == [-1, -1] and current == [5] and len(gpu.launches) == 2


def _hook_chain(chain, call):
    chain.add(call)
    return lambda: chain.remove(call)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_run_by_triton(name, gpu, monkeypatch):
    bound, out = _bound(), _tensor()
    launch.launch(bound, (1,), (out, None, out), (14, 64, 1))
    through_triton = []
    monkeypatch.setattr(
        JITFunction, "run", lambda self, *args, **kwargs: through_triton.append(kwargs["grid"])
    )
    launch.launch(bound, (1,), (out, None, out), (14, 64, 1))
    assert not through_triton
    remove = _hook_chain(getattr(knobs.runtime, name), print)
    launch.launch(bound, (2,), (out, None, out), (14, 64, 1))
    remove()
    with knobs.runtime.scope():
        setattr(knobs.runtime, name, print)
        launch.launch(bound, (3,), (out, None, out), (14, 64, 1))
        setattr(knobs.runtime, name, None)
        launch.launch(bound, (4,), (out, None, out), (14, 64, 1))
    launch.launch(bound, (5,), (out, None, out), (14, 64, 1))
    assert through_triton == [(2,), (3,)]


def test_threads_compile_a_kernel_once(gpu):
    bound, out = _bound(), _tensor()
    start, errors = threading.Barrier(8), []

    def work():
        try:
            start.wait()
            for n in range(50):
                launch.launch(bound, (n + 1,), (out, None, out), (n, 64, 1))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and gpu.loaded == ["_add"] and len(gpu.launches) == 400
    assert sorted(e.grid[0] for e in gpu.launches) == sorted(list(range(1, 51)) * 8)


def test_interpreter_runs_the_kernel(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETING", True)
    bound = _bound(InterpretedFunction(_add), scale=2.0)
    x, out = torch.arange(14.0), torch.zeros(14)
    launch.launch(bound, (1,), (x, x, out), (14, 1, 1))
    assert torch.equal(out, 4 * x) and not bound.compiled


def test_constants_must_be_the_last_parameters():
    with pytest.raises(ValueError, match=r"constants: got \['BLOCK', 'd'\], expected the last"):
        launch.BoundKernel(_kernel(), {"BLOCK": 16, "d": 1}, {})
    with pytest.raises(ValueError, match=r"constants: got \['BLOCK', 'scale'\], expected the last"):
        launch.BoundKernel(_kernel(), {"BLOCK": 16, "scale": 1.0}, {})


def test_number_of_tensors_is_checked(gpu):
    with pytest.raises(ValueError, match="tensors: got 2 for _add, expected 3"):
        launch.launch(_bound(), (1,), (_tensor(), _tensor()), (14, 64, 1))
