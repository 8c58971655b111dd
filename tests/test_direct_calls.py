"""Calls of a backend without PyTorch's dispatcher, and edits whose arguments are known to be valid.

The results of direct calls are tested by every test that runs on the ``triton`` backend.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reft_kernels as rk
from reft_kernels import ops
from reft_kernels.arguments import BuiltWeights, EditWeights
from reft_kernels.autograd import operators_check
from reft_kernels.checks import mark_rows
from reft_kernels.dispatch import interpreting
from reft_kernels.interventions import STACKED, LoReFT
from reft_kernels.operator_checks import as_built, is_checked

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not interpreting(),
    reason="needs the package triton and its interpreter (TRITON_INTERPRET=1)",
)


@pytest.fixture
def triton_backend():
    with rk.backend("triton"):
        yield


class _Subclass(torch.Tensor):
    pass


class _DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


NAMES = ("edit", "edit_", "edit_backward", "edit_backward_", "red", "red_", "red_backward_")


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_backends_that_launch_from_python_are_called_directly(name, triton_backend):
    hidden = torch.zeros(4, 8)
    call = ops.direct(name, hidden)
    assert call is not None and ops.direct(name, hidden) is call
    assert ops.direct(name, hidden.double().half()) is not call


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_other_backends_are_called_through_the_dispatcher(backend):
    try:
        with rk.backend(backend):
            assert ops.direct("edit_", torch.zeros(4, 8)) is None
    except rk.BackendError as reason:
        pytest.skip(f"the backend {backend} is absent: {reason}")


@needs_triton
def test_choice_follows_the_forced_backend(triton_backend):
    hidden = torch.zeros(4, 8)
    assert ops.direct("edit_", hidden) is not None
    with rk.backend("torch"):
        assert ops.direct("edit_", hidden) is None
    assert ops.direct("edit_", hidden) is not None


@needs_triton
@pytest.mark.parametrize(
    "context",
    [
        _DispatchMode,
        _FunctionMode,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
    ids=["dispatch mode", "function mode", "profiler"],
)
def test_modes_see_the_operator(context, triton_backend):
    hidden = torch.zeros(4, 8)
    with context():
        assert ops.direct("edit_", hidden) is None
    assert ops.direct("edit_", hidden) is not None


@needs_triton
def test_subclasses_and_transforms_see_the_operator(triton_backend):
    hidden, seen = torch.zeros(4, 8), []
    assert ops.direct("edit_", hidden.as_subclass(_Subclass)) is None

    def function(x):
        seen.append(ops.direct("edit_", x))
        return x.sum()

    torch.func.grad(function)(hidden)
    assert seen == [None]


@needs_triton
def test_profiler_shows_the_operators(triton_backend):
    R = torch.linalg.qr(torch.randn(8, 2)).Q.mT.contiguous().requires_grad_()
    hidden = torch.randn(4, 8, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rk.loreft(hidden, R, R * 2, R[:, 0]).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"reft_kernels::edit", "reft_kernels::edit_backward"} <= names


@needs_triton
def test_direct_calls_check_their_arguments(triton_backend):
    hidden, R, b = torch.randn(4, 8), torch.randn(2, 8), torch.randn(2)
    before = hidden.clone()
    for changed, error in (
        ({"rows": torch.tensor([9], dtype=torch.int32)}, "rows"),
        ({"rows": torch.tensor([1, 1], dtype=torch.int32)}, "rows"),
        ({"rows": torch.tensor([1])}, "rows"),
        ({"W": torch.randn(2, 9)}, "W"),
        ({"b": torch.randn(3)}, "b"),
        ({"b": torch.zeros(2, dtype=torch.int32)}, "b"),
        ({"coeff": torch.zeros(5, 2)}, "coeff"),
        ({"W": hidden[:2]}, "read"),
    ):
        arguments = {"R": R, "W": R * 2, "b": b} | changed
        with pytest.raises((TypeError, ValueError), match=rf"\b{error}:"):
            rk.loreft(hidden, inplace=True, **arguments)
        assert torch.equal(hidden, before)


# ---- Weights and rows that are known to be valid


def _weights(r=2, d=8, **changed) -> EditWeights:
    weights = EditWeights(torch.randn(r, d), torch.randn(r), torch.randn(r, d), None, True)
    return weights._replace(**changed)


def test_consistent_weights_are_marked():
    for weights in (
        _weights(),
        _weights(read=None, read_bias=None),
        _weights(subtract_bias=torch.zeros(2)),
        _weights(read=torch.zeros(2, 8, dtype=torch.bfloat16)),
        EditWeights(torch.zeros(3, 2, 8), None, torch.zeros(3, 2, 8), None, False),
    ):
        marked = as_built(weights)
        assert type(marked) is BuiltWeights and tuple(marked) == tuple(weights)


@pytest.mark.parametrize(
    "changed",
    [
        {"read": torch.zeros(2, 9)},
        {"read_bias": torch.zeros(3)},
        {"read_bias": torch.zeros(2, dtype=torch.int64)},
        {"read_bias": torch.zeros(2, device="meta")},
        {"write": torch.zeros(2, 8).to_sparse()},
        {"write": torch.zeros(8)},
        {"subtract_bias": torch.zeros(2), "subtract_projection": False},
    ],
    ids=str,
)
def test_inconsistent_weights_are_not_marked(changed):
    weights = _weights(**changed)
    assert as_built(weights) is weights


def test_what_is_checked_before_an_edit_without_checks():
    weights, hidden = as_built(_weights()), torch.zeros(2, 3, 8)
    rows = mark_rows(torch.tensor([0, 5], dtype=torch.int32), 6)
    assert is_checked(hidden, weights, rows, None)
    assert not is_checked(hidden, EditWeights(*weights), rows, None)
    assert not is_checked(hidden, weights, None, None)
    assert not is_checked(hidden, weights, rows.clone(), None)  # not marked
    assert not is_checked(hidden, weights, rows, rows)
    assert not is_checked(hidden[:1], weights, rows, None)  # fewer rows than checked for
    assert not is_checked(torch.zeros(6, 9), weights, rows, None)
    assert not is_checked(hidden.long(), weights, rows, None)
    assert not is_checked(hidden.to("meta"), weights, rows, None)
    rows[0] = 7
    assert not is_checked(hidden, weights, rows, None)  # changed after the check


@pytest.mark.parametrize("name", [name for name in STACKED if name != "red"])
def test_modules_check_their_weights_once(name):
    for weights in STACKED[name](3, 8, 2)():
        assert type(weights) is BuiltWeights


@needs_triton
def test_module_with_known_rows_refuses_a_wrong_hidden_state(triton_backend):
    module = LoReFT(8, 2)
    rows = mark_rows(torch.tensor([0, 3], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="write"):
        module(torch.zeros(4, 9), rows=rows, inplace=True)
    with pytest.raises(ValueError, match="rows"):
        module(torch.zeros(2, 8), rows=rows, inplace=True)


def test_arguments_are_checked_once():
    """The public functions leave the checks to the operators wherever these check everything."""
    hidden, gpu = torch.zeros(6, 8), torch.zeros(6, 8, device="meta")  # meta: not on the CPU
    rows = torch.tensor([0, 5], dtype=torch.int32)
    assert operators_check(hidden, rows, None) and operators_check(hidden, None, rows)
    assert operators_check(gpu, None, None)
    assert not operators_check(gpu, rows, None)  # that rows are distinct must be read
    mark_rows(rows, 6)
    assert operators_check(gpu, rows, None)
    assert not operators_check(gpu[:5], rows, None)
    assert not operators_check(gpu, rows, rows)
    assert not operators_check("hidden", None, None)
    assert not operators_check(torch.zeros(6, 0, device="meta"), rows, None)
