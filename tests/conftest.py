"""Fixtures shared by all tests: backends, devices, seeds and poisoned memory.

Without a GPU, Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

import reft_kernels as rk
from reft_kernels import cpu, dispatch, host_calls
from reft_kernels.dispatch import interpreting

torch.set_num_threads(1)

_INTEGER_POISON = 0x5A5A5A5A
_ON_MODELS = [
    Path(__file__).parent / name for name in ("model", "integrations")
]  # what depends on transformers' own modules
_TRITON = Path(__file__).parent / "triton"
_FULL = pytest.StashKey[bool]()


def _targets() -> list:
    """Return the (backend, device) pairs that this machine supports."""
    triton = importlib.util.find_spec("triton") is not None
    targets = [pytest.param(("torch", "cpu"), id="torch-cpu")]
    if dispatch.unsupported_reason("cpu", "edit", "cpu", torch.float32) is None:
        targets.append(pytest.param(("cpu", "cpu"), id="cpu-cpu"))
    if triton and interpreting():
        targets.append(pytest.param(("triton", "cpu"), id="triton-cpu"))
    if dispatch.unsupported_reason("cuda", "edit", "cpu", torch.float32) is None:
        targets.append(
            pytest.param(("cuda", "cpu"), id="cuda-emulated", marks=pytest.mark.emulated)
        )
    if torch.cuda.is_available():
        targets += [
            pytest.param((name, "cuda"), id=f"{name}-cuda", marks=pytest.mark.gpu)
            for name in ("torch", "triton")
        ]
        if dispatch.unsupported_reason("cuda", "edit", "cuda", torch.float32) is None:
            targets.append(pytest.param(("cuda", "cuda"), id="cuda-cuda", marks=pytest.mark.gpu))
    return targets


@pytest.fixture(params=_targets())
def _target(request):
    name, device = request.param
    with rk.backend(name):
        yield name, device


@pytest.fixture
def backend(_target) -> str:
    """The name of the forced backend. The fixture runs a test once per supported backend."""
    return _target[0]


@pytest.fixture
def device(_target) -> str:
    """The device of the backend."""
    return _target[1]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_mixed_precision():
    """Undo a mixed precision that a test's Trainer has set for the whole process."""
    name = "ACCELERATE_MIXED_PRECISION"
    before = os.environ.get(name)
    yield
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before
    state = sys.modules.get("accelerate.state")
    if state is None:
        return
    if state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state(True)


def _poisoned(function):
    def allocate(*args, **kwargs):
        tensor = function(*args, **kwargs)
        with torch.no_grad():
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(_INTEGER_POISON & torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate


@pytest.fixture
def poison(monkeypatch):
    """Fill newly allocated memory with NaN, or a sentinel for integers.

    A test with this fixture fails if an output is not fully written.
    """
    for holder, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ]:
        monkeypatch.setattr(holder, name, _poisoned(getattr(holder, name)))
    native = cpu.instruction_set() is not None
    if native:
        torch.ops.reft_kernels_cpu.poison_memory(
            True
        )  # as for the outputs that the native library makes itself
    if host_calls.library is not None:
        host_calls.library.poison_memory(True)
    yield
    if host_calls.library is not None:
        host_calls.library.poison_memory(False)
    if native:
        torch.ops.reft_kernels_cpu.poison_memory(False)


hypothesis.settings.register_profile(
    "reft_kernels",
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("reft_kernels")


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="run the exhaustive tests, marked full, too"
    )


def pytest_configure(config):
    # an expression that names the marker decides by itself
    config.stash[_FULL] = (
        config.option.full or re.search(r"\bfull\b", config.option.markexpr) is not None
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        on_models = any(item.path.is_relative_to(folder) for folder in _ON_MODELS)
        if on_models and item.get_closest_marker("transformers5") is None:
            item.add_marker("transformers4")
        # modules that run Triton's kernels name their device; test_aot only compiles
        if item.path.parent == _TRITON and getattr(item.module, "DEVICE", "cpu") == "cuda":
            item.add_marker("gpu")
    left_out = (
        []
        if config.stash[_FULL]
        else [item for item in items if item.get_closest_marker("full") is not None]
    )
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("full") is None]
