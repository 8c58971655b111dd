"""The host library makes the launches that the Python launchers make.

Kernels are compiled for a GPU without one, and none runs (:mod:`benchmarks.fake_gpu`). Launches are
compared in full: the function, the grid, the block, shared memory, the stream and every parameter,
as the GPU driver's launch function receives them.

:mod:`tests.triton.test_host_launches` runs this file without Triton's interpreter, in which kernels
cannot be compiled.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from triton import knobs
from triton.backends.compiler import GPUTarget

from benchmarks import fake_gpu
from reft_kernels import host_calls
from reft_kernels.arguments import BuiltWeights, EditWeights, RoundedMatrices, RowSelection
from reft_kernels.autograd import apply_edit
from reft_kernels.checks import mark_rows

launch = importlib.import_module("reft_kernels.triton.launch")

pytestmark = pytest.mark.skipif(
    host_calls.library is None, reason=f"the host library: {host_calls.unavailable_reason()}"
)


class Case(NamedTuple):
    """An edit; the defaults are LoReFT of selected rows, in place, in fp32."""

    shape: tuple[int, ...] = (32, 64)
    rank: int = 4
    rows: int | None = 14
    activation: str = "linear"
    absent: str = "subtract_bias coeff"
    subtract: bool = True
    inplace: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    frozen: bool = False  # only the hidden states require grad
    offset: int = 0  # elements by which weights are misaligned
    rounded: bool = False  # the forward pass reads bf16 copies of the matrices


CASES = {
    "loreft": Case(),
    "out of place": Case(inplace=False),
    "three dimensions": Case(shape=(2, 16, 64)),
    "all rows": Case(rows=None),
    "all rows out of place": Case(rows=None, inplace=False),
    "all rows on chip": Case(shape=(2048, 64), rows=None, subtract=False, dtype=torch.bfloat16),
    "chunks": Case(shape=(4096, 64), rows=None, dtype=torch.bfloat16),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16 weights": Case(dtype=torch.bfloat16, weight_dtype=torch.bfloat16),
    "bf16 copies": Case(dtype=torch.bfloat16, rounded=True),
    "bf16 copies, all rows": Case(dtype=torch.bfloat16, rounded=True, rows=None, inplace=False),
    "gelu": Case(activation="gelu", absent="coeff"),
    "direft": Case(subtract=False),
    "consreft": Case(absent="read subtract_bias coeff"),
    "lobireft": Case(absent="read subtract_bias coeff", subtract=False),
    "coeff": Case(absent="subtract_bias"),
    "frozen": Case(frozen=True),
    "misaligned": Case(offset=1),
    "one row": Case(rows=1),
    "one column": Case(shape=(32, 1), rank=1),
    "odd": Case(shape=(17, 19), rank=3, rows=5),
    "columns in parts": Case(shape=(32, 2048), rank=64),
    "columns in parts, out of place": Case(shape=(32, 2048), rank=64, inplace=False),
    "columns in parts, two sums": Case(
        shape=(32, 2048), rank=64, activation="gelu", absent="coeff"
    ),
    "columns in parts forward only": Case(shape=(32, 1024), rank=64, dtype=torch.bfloat16),
}


class Inputs:
    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case, d, r = case, case.shape[-1], case.rank
        num_rows = case.shape[0] * (case.shape[1] if len(case.shape) == 3 else 1)
        self.n = num_rows if case.rows is None else case.rows
        self.leaf = torch.randn(case.shape, dtype=case.dtype, requires_grad=True)
        self.scale = torch.randn(case.shape, dtype=case.dtype)
        shapes = {
            "read": (r, d),
            "read_bias": (r,),
            "write": (r, d),
            "subtract_bias": (r,),
            "coeff": (self.n, r),
        }
        self.weights = {
            name: self._weight(shape)
            for name, shape in shapes.items()
            if name not in case.absent.split()
        }
        self.rows = None
        if case.rows is not None:
            self.rows = mark_rows(torch.arange(case.rows, dtype=torch.int32) * 2, num_rows)

    def _weight(self, shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.randn(count + self.case.offset, dtype=self.case.weight_dtype)
        weight = buffer[self.case.offset :].view(shape)
        return weight.detach().requires_grad_(not self.case.frozen)

    def run(self, count: Callable[[], int] = lambda: 0) -> dict[int, str]:
        """Run an edit and its backward pass; return the names of the tensors' addresses.

        ``count`` returns the number of launches so far; ``forward`` keeps that of the forward pass.
        """
        case, get = self.case, self.weights.get
        weights = EditWeights(
            get("read"), get("read_bias"), get("write"), get("subtract_bias"), case.subtract
        )
        copies = {}
        if case.rounded:
            weights = BuiltWeights(*weights)
            weights.rounded = (RoundedMatrices(weights.read[None], weights.write[None]), 0)
            names = ("read of the forward pass", "write of the forward pass")
            copies = dict(zip(names, weights.rounded[0].layer(0), strict=True))
        self.kept = []  # all that is named stays allocated

        def keep(tensor):
            self.kept.append(tensor)
            return tensor

        hidden = self.leaf * 1
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = apply_edit(
                hidden,
                weights,
                RowSelection(self.rows, None, get("coeff")),
                case.activation,
                case.inplace,
            )
        self.forward = count()
        assert (y is hidden) == case.inplace and y.shape == hidden.shape and y.dtype == case.dtype
        named = {f"saved {i}": tensor for i, tensor in enumerate(self.kept)}
        wanted = {"leaf": self.leaf}
        wanted |= {} if case.frozen else self.weights
        grads = torch.autograd.grad((y * self.scale).sum(), list(wanted.values()))
        self.grads = dict(zip(wanted, grads, strict=True))
        for name, grad in self.grads.items():
            assert grad.shape == wanted[name].shape and grad.dtype == wanted[name].dtype
            if name != "leaf" and grad.dtype == torch.float32:  # not converted
                named[f"gradient of {name}"] = grad
        named |= {"y": y, "rows": self.rows, "hidden": hidden, **self.weights, **copies}
        self.kept.append((hidden, y, copies))
        return {t.data_ptr(): name for name, t in named.items() if t is not None and t.numel()}


def _named(parameters: list, types: list[str], names: dict[int, str]) -> list:
    """Replace addresses by names: of tensors, or of temporary memory in the order of its use."""
    result = []
    for kind, value in zip(types, parameters, strict=True):
        if kind.startswith("*"):
            value = value.data_ptr() if isinstance(value, torch.Tensor) else value
            name = names.setdefault(value, f"temporary {len(names)}") if value else "null"
            result.append((kind, name, value % 16))
        else:
            result.append((kind, value))
    return result


def _pythons(fake, names: dict[int, str], packed, forward: int = 0) -> list[tuple]:
    """Return what Triton's launcher passes to the driver for the launches made in Python.

    The backward pass may have the address of temporary memory of the ``forward`` launches.
    """
    known, result = dict(names), []
    for number, (entry, metadata) in enumerate(zip(fake.launches, packed, strict=True)):
        num_warps, _, shared = metadata
        names = dict(known) if number in (0, forward) else names
        types = fake.signatures[entry.function]
        kept = [i for i, kind in enumerate(types) if kind != "constexpr"]
        parameters = _named([entry.arguments[i] for i in kept], [types[i] for i in kept], names)
        parameters += [("scratch", 0), ("scratch", 0)]
        block = (num_warps * fake.target.warp_size, 1, 1)
        result.append((entry.function, entry.grid, block, shared, entry.stream, parameters))
    return result


def _drivers(fake, names: dict[int, str], forward: int = 0) -> list[tuple]:
    """Return the launches that the host library passed to the driver."""
    known, result = dict(names), []
    for number, entry in enumerate(fake.driver_launches):
        names = dict(known) if number in (0, forward) else names
        types = [kind for kind in fake.signatures[entry.function] if kind != "constexpr"]
        parameters = _named(list(entry.parameters[:-2]), types, names)
        parameters += [("scratch", value) for value in entry.parameters[-2:]]
        result.append((*entry[:5], parameters))
    return result


@pytest.fixture
def packed():
    """The packed metadata of the launches in Python, which the stand-in receives and drops."""
    return []


@pytest.fixture(params=["cuda"])
def gpu(request, packed):
    targets = {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}
    with fake_gpu.installed(targets[request.param]) as fake, fake_gpu.serving_cpu_tensors():
        launcher = fake.launcher_cls

        def launcher_cls(src, metadata):
            run = launcher(src, metadata)

            def called(*arguments):
                packed.append(arguments[5])
                return run(*arguments)

            return called

        fake.launcher_cls = launcher_cls
        yield fake


def _forget(fake, packed):
    fake.launches.clear()
    fake.driver_launches.clear()
    packed.clear()


def _compare(inputs, gpu, packed, monkeypatch) -> int:
    """Compare the launches of a call; return their number."""
    inputs.run()  # compiles and records
    assert gpu.launches and not gpu.driver_launches
    first = len(gpu.launches)
    _forget(gpu, packed)
    names = inputs.run(lambda: len(gpu.driver_launches))
    assert not gpu.launches and len(gpu.driver_launches) == first
    in_cpp = _drivers(gpu, names, inputs.forward)
    _forget(gpu, packed)
    with monkeypatch.context() as patch:
        patch.setattr(host_calls, "apply_edit", None)
        names = inputs.run(lambda: len(gpu.launches))
    assert not gpu.driver_launches
    assert in_cpp == _pythons(gpu, names, packed, inputs.forward)
    return first


@pytest.mark.parametrize("name", CASES)
def test_launches_are_those_of_the_python_launchers(name, gpu, packed, monkeypatch):
    launches = _compare(Inputs(CASES[name]), gpu, packed, monkeypatch)
    assert (launches > 3) == name.startswith("columns in parts")


@pytest.mark.parametrize("gpu", ["hip"], indirect=True)
@pytest.mark.parametrize("name", ["loreft", "chunks"])
def test_launches_on_amd(name, gpu, packed, monkeypatch):
    _compare(Inputs(CASES[name]), gpu, packed, monkeypatch)


def test_calls_of_another_class_have_their_own_plan(gpu, packed, monkeypatch):
    for case in (Case(), Case(rows=3), Case(shape=(16, 64), rows=8), Case(offset=1), Case()):
        inputs = Inputs(case)
        inputs.run()
        _forget(gpu, packed)
        names = inputs.run()
        in_cpp = _drivers(gpu, names)
        _forget(gpu, packed)
        with monkeypatch.context() as patch:
            patch.setattr(host_calls, "apply_edit", None)
            names = inputs.run()
        assert in_cpp == _pythons(gpu, names, packed)


def test_stream_is_read_at_each_launch(gpu):
    inputs = Inputs(Case())
    inputs.run()
    for stream in (7, 0, 2**63 + 5):
        gpu.stream = stream
        gpu.driver_launches.clear()
        inputs.run()
        assert {entry.stream for entry in gpu.driver_launches} == {stream}


def test_launch_hooks_and_replaced_launchers_are_seen_by_python(gpu, monkeypatch):
    inputs = Inputs(Case())
    inputs.run()
    gpu.launches.clear()
    knobs.runtime.launch_enter_hook.add(print_nothing)
    inputs.run()
    knobs.runtime.launch_enter_hook.remove(print_nothing)
    with knobs.runtime.scope():
        knobs.runtime.launch_exit_hook = print_nothing
        inputs.run()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(launch, "launch", lambda *arguments: seen.append(arguments))
        inputs.run()
    assert len(gpu.launches) == 6 and len(seen) == 3 and not gpu.driver_launches
    inputs.run()
    assert len(gpu.driver_launches) == 3


def print_nothing(*arguments, **keywords) -> None:
    """A launch hook."""


def test_driver_errors_are_raised(gpu):
    inputs = Inputs(Case())
    inputs.run()
    failing = fake_gpu.LAUNCH_FUNCTION(lambda *arguments: 700)
    stream = fake_gpu.address_of(gpu.stream_function)
    host_calls.library.replace_driver(fake_gpu.address_of(failing), stream)
    with pytest.raises(RuntimeError, match="launch of a kernel failed: error 700"):
        inputs.run()
    host_calls.library.replace_driver(fake_gpu.address_of(gpu.launch_function), stream)
    inputs.run()


def test_without_a_graph(gpu):
    inputs, weights = Inputs(Case()), None
    weights = EditWeights(*[inputs.weights.get(k) for k in EditWeights._fields[:4]], True)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            hidden = torch.randn(inputs.case.shape)
            gpu.launches.clear()
            for _ in range(2):
                gpu.driver_launches.clear()
                y = apply_edit(hidden, weights, RowSelection(inputs.rows), "linear", True)
            assert y is hidden and len(gpu.driver_launches) == 1
    assert not gpu.launches  # the plan of the first context serves the second, too
