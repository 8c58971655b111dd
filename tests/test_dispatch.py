"""Selection of backends, forced backends, and imports of the package."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import reft_kernels as rk
from reft_kernels import cpu, dispatch, ops, reference
from reft_kernels.dispatch import OPERATORS, BackendError

ROOT = Path(__file__).parents[1]


def _python(script: str, **environment: str) -> subprocess.CompletedProcess:
    env = {
        k: v for k, v in os.environ.items() if k not in ("REFT_KERNELS_BACKEND", "TRITON_INTERPRET")
    }
    env |= {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=ROOT
    )


EDIT = (
    "import torch, reft_kernels as rk; print(rk.red(torch.ones(1, 2), torch.ones(2), "
    "torch.ones(2)).tolist())"
)


def test_forcing_is_scoped():
    before = rk.forced_backend()
    with rk.backend("torch"):
        assert rk.forced_backend() == "torch"
        for automatic in ("auto", "", None):
            with rk.backend(automatic):
                assert rk.forced_backend() is None
        assert rk.forced_backend() == "torch"
    assert rk.forced_backend() == before
    with pytest.raises(KeyError), rk.backend("torch"):
        raise KeyError
    assert rk.forced_backend() == before


@pytest.mark.parametrize("name", ["opencl", "Torch", 3])
def test_unknown_backend(name):
    with pytest.raises(
        ValueError, match="^backend: got .*expected one of triton, cuda, cpu, torch or auto"
    ):
        rk.set_backend(name)


def test_unknown_operator():
    with pytest.raises(ValueError, match="^operator: got 'edot', expected one of edit"):
        dispatch.unsupported_reason("torch", "edot", "cpu", torch.float32)


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_backend_of_another_build_raises_where_forced(name, monkeypatch):
    monkeypatch.setattr("reft_kernels.cpu._why_off", lambda: "the native library was not built")
    hidden = torch.ones(2, 4)
    with (
        rk.backend(name),
        pytest.raises(BackendError, match=f"^backend '{name}' is forced but cannot run red on cpu"),
    ):
        rk.red(hidden, torch.ones(4), torch.ones(4), inplace=True)
    assert torch.equal(hidden, torch.ones(2, 4))


def test_triton_serves_no_fp64():
    with (
        rk.backend("triton"),
        pytest.raises(
            BackendError, match="fp64 is served by the torch backend|triton is not installed"
        ),
    ):
        rk.red(torch.ones(1, 2, dtype=torch.float64), torch.ones(2), torch.ones(2))


def test_automatic_choice_on_cpu_does_not_warn():
    with rk.backend(None), warnings.catch_warnings():
        warnings.simplefilter("error")
        for operator in OPERATORS:
            assert dispatch.choose(operator, "cpu", torch.float32) == ("cpu", {})
        rk.red(torch.ones(1, 2), torch.ones(2), torch.ones(2))


def test_falling_back_warns_once(monkeypatch):
    """On a GPU without Triton, the torch backend is used and a warning is issued once."""
    monkeypatch.setattr(dispatch, "_PREFERENCE", {"cpu": ("triton", "torch")})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with (
        rk.backend(None),
        pytest.warns(
            UserWarning, match="backend 'triton' is off .*'torch' serves instead"
        ) as caught,
    ):
        R = rk.householder(torch.randn(8, 2))
        rk.loreft(torch.randn(3, 8), R, R, torch.zeros(2))
    assert len(caught) == 1


def test_every_backend_has_every_operator(backend, device):
    for operator in OPERATORS:
        function = dispatch.select(operator, torch.ones(1, device=device))
        assert _is_native(operator) if function is None else callable(function)


def _is_native(operator: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"reft_kernels::{operator}", "CPU")


@pytest.mark.skipif(
    cpu.instruction_set() is None, reason="the native library of this package is not built here"
)
def test_the_native_kernels_are_the_operators_while_they_serve(monkeypatch):
    """No Python runs then: neither the table nor the door."""
    call = torch.ones(1, 2), None, None, torch.ones(2), torch.ones(2), False
    assert all(map(_is_native, ops.SCHEMAS))
    selected = []
    monkeypatch.setattr(dispatch, "select", lambda *key: selected.append(key) or reference.red)
    for name, handed_on in (("cpu", 0), ("torch", 1), (None, 1)):
        with rk.backend(name):
            assert torch.ops.reft_kernels.red(*call)[0].tolist() == [[2.0, 2.0]]
        assert len(selected) == handed_on


@pytest.mark.skipif(
    cpu.instruction_set() is None, reason="the native library of this package is not built here"
)
def test_backends_are_forced_while_others_run():
    """Every call is served by one backend or the other."""
    hidden, scale = torch.randn(64, 32), torch.randn(32)
    want = scale * hidden + scale
    done = threading.Event()

    def work(_) -> bool:
        right = True
        while not done.is_set():
            right &= torch.allclose(rk.red(hidden, scale, scale), want)
        return right

    with rk.backend(None), ThreadPoolExecutor(3) as pool:
        running = [pool.submit(work, i) for i in range(3)]
        for _ in range(300):
            rk.set_backend("torch")
            rk.set_backend("cpu")
        done.set()
        assert all(r.result() for r in running)


def test_the_environment_forces():
    assert "[[2.0, 2.0]]" in _python(EDIT, REFT_KERNELS_BACKEND="torch").stdout
    off = _python(EDIT, REFT_KERNELS_BACKEND="triton")
    assert off.returncode != 0 and "BackendError: backend 'triton' is forced" in off.stderr
    unknown = _python(EDIT, REFT_KERNELS_BACKEND="opencl")
    assert (
        unknown.returncode != 0
        and "REFT_KERNELS_BACKEND: got 'opencl', expected one of" in unknown.stderr
    )


_BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""
_BLOCKED_USE = """
import torch
import reft_kernels as rk
R = rk.householder(torch.randn(8, 2))
module = rk.LoReFT(8, 2)
rows = rk.positions.resolve("f1+l1", [2, 3], 3)
module(torch.randn(2, 3, 8, requires_grad=True), rows=rows).sum().backward()
print("served")
"""


def test_importing_needs_torch_alone():
    blocked = ("transformers", "peft", "triton", "safetensors", "accelerate", "tqdm", "matplotlib")
    done = _python(_BLOCKED.format(blocked=blocked) + _BLOCKED_USE)
    assert done.stdout.strip() == "served", done.stderr


def test_importing_loads_no_kernels_and_no_hugging_face():
    done = _python(
        "import sys, torch; before = set(sys.modules); import reft_kernels; "
        "print(*(set(sys.modules) - before))"
    )
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert new and not new & {"triton", "transformers", "peft", "safetensors", "numpy"}
    assert not any(
        name.startswith(("reft_kernels.triton", "reft_kernels.integrations"))
        for name in done.stdout.split()
    )
