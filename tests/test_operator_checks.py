"""Tests of the argument checks of ``torch.ops.reft_kernels.*``, on each backend.

Invalid arguments must raise TypeError or ValueError before a tensor is written.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import reft_kernels as rk
from reft_kernels import dispatch, operator_checks, ops
from reft_kernels.checks import assert_range, mark_rows
from reft_kernels.parametrization import MAX_RANK, base_point
from tests.fuzz_operators import argument_kinds, argument_names

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
    """Return arguments of a valid call of ``edit_`` on rows 1 and 4, updated with ``changed``."""
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


LARGE = MAX_RANK + 344  # rank 600 once crashed the process
WRONG = {
    "int64 rows": ({"rows": torch.tensor([1, 4])}, "rows: .*int64.*int32"),
    "rows beyond the end": ({"rows": int32(1, M)}, "rows: got values from 1 to 6"),
    "negative rows": ({"rows": int32(-2, 1)}, "rows: got values from -2"),
    "repeated rows": ({"rows": int32(4, 4)}, "rows: row 4 occurs more than once"),
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


# ---- Every operator, with each tensor argument invalid in each way


def _edit_call(name: str) -> dict:
    """Return arguments of a valid call of an edit operator, with all optional tensors."""
    call = {
        "hidden": torch.randn(M, D),
        "rows": int32(1, 4, -1),
        "weight_ids": int32(0, 1, 0),
        "read": torch.randn(2, R, D),
        "read_bias": torch.randn(2, R),
        "write": torch.randn(2, R, D),
        "subtract_bias": torch.randn(2, R),
        "coeff": torch.rand(3, R),
        "subtract_projection": True,
        "activation": "gelu",
        "save": True,
    }
    if "backward" in name:
        _, saved_input, u, z = OPS.edit(*call.values())
        call |= {
            "grad": torch.randn(M, D),
            "saved_input": saved_input,
            "u": u,
            "z": z,
            "need_hidden": True,
            "need_weights": True,
        }
    return call


def _red_call(name: str) -> dict:
    call = {
        "hidden": torch.randn(M, D),
        "rows": int32(1, 4, -1),
        "weight_ids": int32(0, 1, 0),
        "scale": torch.randn(2, D),
        "bias": torch.randn(2, D),
        "save": True,
    }
    if "backward" in name:
        _, saved_input = OPS.red(*call.values())
        call |= {
            "grad": torch.randn(M, D),
            "saved_input": saved_input,
            "need_hidden": True,
            "need_weights": True,
        }
    return call


def _map_call(name: str) -> dict:
    point = base_point(rk.householder(torch.randn(2, D, R)))
    call = {
        "X": torch.randn(2, D, R),
        "signs": point.signs,
        "base": point.reflectors,
        "base_point": point.R,
        "W": torch.randn(2, R, D),
    }
    if "backward" in name:
        aux = getattr(OPS, name.removesuffix("_backward"))(*call.values())[2]
        call |= {"grad_R": torch.randn(2, R, D), "grad_D": torch.randn(2, R, D), "aux": aux}
    return call


def valid_call(name: str) -> dict:
    """Return arguments of a valid call of an operator by name, with all optional tensors."""
    draw = {"edit": _edit_call, "red": _red_call}.get(name.split("_")[0], _map_call)
    call = draw(name)
    return {key: call[key] for key in argument_names(name)}


WAYS = {
    "dtype": lambda t: t.to(torch.complex64),
    "integers": lambda t: t.to(torch.int64),
    "rank": lambda t: t.unsqueeze(0),
    "fewer dimensions": lambda t: t[0],
    "shape": lambda t: torch.cat([t, t], -1),
    "no channels": lambda t: t[..., :0],
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
}
TENSORS = [
    (name, key)
    for name in ops.SCHEMAS
    for key, kind in argument_kinds(name).items()
    if "Tensor" in kind
]
# arguments that determine the expected sizes of others, so the error may name another argument
_LEADING = ("hidden", "grad", "rows", "write", "scale", "X")


def _refused(name: str, call: dict, message: str) -> None:
    """Assert that a call raises an error that matches ``message`` and changes no tensor."""
    before = {
        k: v.clone() for k, v in call.items() if torch.is_tensor(v) and v.device.type == "cpu"
    }
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(OPS, name)(*call.values())
    for key, was in before.items():
        assert torch.equal(call[key].to_dense(), was.to_dense()), f"{key} changed"


@pytest.mark.parametrize(("name", "argument"), TENSORS, ids=lambda value: value)
def test_every_tensor_of_every_operator_is_checked(name, argument, backend):
    for way, change in WAYS.items():
        call = valid_call(name)
        call[argument] = change(call[argument])
        message = rf"^{name}: {argument}: got .*expected"
        if argument in _LEADING and way in (
            "shape",
            "no channels",
            "rank",
            "fewer dimensions",
            "device",
        ):
            message = rf"^{name}: \w+: (got|row) .*expected"
        _refused(name, call, message)


@pytest.mark.parametrize(("name", "argument"), TENSORS, ids=lambda value: value)
def test_none_is_a_tensor_only_where_the_schema_says_so(name, argument, backend):
    if not argument_kinds(name)[argument].startswith("Optional"):
        _refused(
            name,
            valid_call(name) | {argument: None},
            f"^{name}: {argument}: got NoneType None, expected a tensor",
        )


ROWS_OF = [n for n in ops.SCHEMAS if "rows" in argument_names(n)]
WRONG_ROWS = {
    "beyond the end": (int32(1, M, -1), "got values from -1 to 6"),
    "far beyond": (int32(1, 2**31 - 1, -1), "got values from -1 to 2147483647"),
    "negative": (int32(1, -2, 0), "got values from -2 to 1"),
    "repeated": (int32(4, -1, 4), "row 4 occurs more than once"),
    "int64": (torch.tensor([1, 4, -1]), ".*int64.*expected torch.int32"),
    "floating": (torch.tensor([1.0, 4.0, -1.0]), ".*float32.*expected torch.int32"),
}
WRONG_SETS = {
    "beyond the end": (int32(0, 2, 0), "got values from 0 to 2"),
    "negative": (int32(0, -1, 0), "got values from -1 to 0"),
    "int64": (torch.tensor([0, 1, 0]), ".*int64.*expected torch.int32"),
    "fewer": (int32(0, 1), r"got shape \(2,\)"),
}


@pytest.mark.parametrize("name", ROWS_OF)
def test_row_and_set_numbers_are_checked(name, backend):
    for argument, wrong in (("rows", WRONG_ROWS), ("weight_ids", WRONG_SETS)):
        for value, message in wrong.values():
            _refused(
                name,
                valid_call(name) | {argument: value.clone()},
                f"^{name}: {argument}: {message}",
            )


IN_PLACE = [n for n in ops.SCHEMAS if n.endswith("_")]


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_written_to_shares_no_memory(name, backend):
    """Test that an in-place operator rejects an expanded first argument and overlapping memory."""
    first = argument_names(name)[0]
    call = valid_call(name)
    _refused(
        name,
        call | {first: call[first][:1].expand(M, D)},
        f"^{name}: {first}: got .*no elements at one address",
    )
    for argument in argument_names(name)[1:]:
        value = call[argument]
        if torch.is_tensor(value) and value.is_floating_point():
            shared = torch.zeros(M * D + value.numel())
            # the first element of ``other`` is the last one of the tensor to be written
            other = shared[M * D - 1 : -1].view(value.shape)
            changed = call | {first: shared[: M * D].view(M, D), argument: other}
            _refused(name, changed, f"^{name}: {argument}: got .*memory apart from what is written")


@pytest.mark.parametrize("name", IN_PLACE)
def test_slices_of_one_tensor_that_lie_apart_are_taken(name, backend):
    first = argument_names(name)[0]
    call = valid_call(name)
    buffer = torch.zeros(3 * M, D)
    buffer[:M] = call[first]
    getattr(OPS, name)(*(call | {first: buffer[M : 2 * M]}).values())
    assert not buffer[2 * M :].any()


@pytest.mark.parametrize("name", [n for n in ops.SCHEMAS if "backward" in n])
def test_gradients_of_other_shapes_are_refused(name, backend):
    for argument in ("grad", "grad_R", "grad_D"):
        if argument in argument_names(name):
            for shape in ((M, D - 1), (M - 3, D), (2, D, R), (2, R), ()):
                _refused(
                    name,
                    valid_call(name) | {argument: torch.zeros(shape)},
                    rf"^{name}: \w+: got .*expected",
                )


@pytest.mark.parametrize("name", [n for n in ops.SCHEMAS if "activation" in argument_names(n)])
@pytest.mark.parametrize("activation", ["", "GELU", "swish", "gelu\0"])
def test_activations_of_other_names_are_refused(name, activation, backend):
    _refused(
        name,
        valid_call(name) | {"activation": activation},
        f"^{name}: activation: got .*expected one of linear",
    )


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


# ---- Range assertions that run on a GPU, tested with a replacement of torch._assert_async


@pytest.fixture
def assertions(monkeypatch) -> list[tuple[bool, str]]:
    """Record the value and message of each call of ``torch._assert_async``."""
    asked: list[tuple[bool, str]] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(
        torch, "_assert_async", lambda value, message: asked.append((bool(value), message))
    )
    return asked


def test_the_device_asserts_a_range_once_for_each_tensor(assertions):
    rows = int32(0, 5, -1)
    for _ in range(2):
        assert_range("edit_: rows", rows, -1, 6)
    assert assertions == [(True, "edit_: rows: expected numbers in [-1, 6)")]
    rows[0] = 7
    assert_range("edit_: rows", rows, -1, 6)
    assert_range("edit_: rows", rows, -1, 5)
    assert_range("edit_: weight_ids", rows, 0, 9)
    assert [holds for holds, _ in assertions] == [True, False, False, False]


def test_the_device_asserts_nothing_that_is_known_or_empty_or_captured(assertions, monkeypatch):
    assert_range("rows", mark_rows(int32(0, 5), 6), -1, 6)
    assert_range("rows", int32(), -1, 6)
    assert not assertions
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert_range("rows", int32(9), -1, 6)
    assert not assertions


def test_an_inference_tensor_is_asserted_each_time(assertions):
    with torch.inference_mode():
        rows = int32(1)
        for _ in range(2):
            assert_range("rows", rows, -1, 6)
    assert len(assertions) == 2  # it has no version counter, so changes cannot be detected


def test_every_operator_on_a_gpu_has_its_numbers_asserted(monkeypatch):
    asked = []
    monkeypatch.setattr(
        operator_checks, "assert_range", lambda *args: asked.append((args[0], *args[2:]))
    )

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    for name in ROWS_OF:
        call = {
            k: v.as_subclass(OnGpu) if torch.is_tensor(v) else v
            for k, v in valid_call(name).items()
        }
        for traced in (False, True):
            with torch._C.DisableTorchFunctionSubclass():
                operator_checks.CHECKS[name](*call.values(), traced=traced)
        assert asked == [(f"{name}: rows", -1, M), (f"{name}: weight_ids", 0, 2)]
        asked.clear()


FUZZ = {
    "torch": ["--backend", "torch", "--cases", "4000"],
    "cpu": ["--backend", "cpu", "--first", "4000", "--cases", "8000"],
    "triton, interpreted": ["--backend", "triton", "--first", "30000", "--cases", "150"],
}


@pytest.mark.parametrize("name", list(FUZZ))
def test_twelve_thousand_mutated_calls(name):
    """Run the fuzzer in a subprocess; if it crashes, its last output line names the case."""
    if not NATIVE and name == "cpu":
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
    assert "'right'" in run.stdout
