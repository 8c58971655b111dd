"""Errors for invalid arguments.

Each error names the argument, the value and what was expected, and is raised before any operator
runs.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import reft_kernels as rk
from reft_kernels.checks import check_row_values, mark_rows

D, R = 8, 3


class Calls(TorchDispatchMode):
    names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def _i32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _call(change):
    """Call loreft with valid arguments, except those in ``change``."""
    good = {
        "hidden": torch.randn(2, 3, D),
        "R": torch.randn(R, D),
        "W": torch.randn(R, D),
        "b": torch.randn(R),
        "inplace": True,
    }
    return {**good, **change}


SETS = {"R": torch.randn(2, R, D), "W": torch.randn(2, R, D), "b": torch.randn(2, R)}
BAD = [
    ({"hidden": [[1.0]]}, TypeError, r"^hidden: got list .*expected a tensor \[\.\.\., d\]"),
    (
        {"hidden": torch.ones(2, D, dtype=torch.int64)},
        TypeError,
        "^hidden: got dtype torch.int64, expected one of torch.float32",
    ),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"^hidden: got shape \(\), expected \[\.\.\., d\]"),
    ({"hidden": torch.ones(2, 0)}, ValueError, r"^hidden: got shape \(2, 0\), expected"),
    ({"R": None}, TypeError, r"^R: got NoneType None, expected a tensor \[r, 8\]"),
    (
        {"R": torch.ones(R, D + 1)},
        ValueError,
        r"^R: got shape \(3, 9\), expected \[r, 8\] \(no weight_ids\)",
    ),
    ({"R": torch.ones(2, R, D)}, ValueError, r"^R: got shape \(2, 3, 8\), expected \[r, 8\]"),
    ({"R": torch.ones(0, D)}, ValueError, "^R: got rank r = 0, expected 1 <= r <= 256"),
    ({"R": torch.ones(257, D)}, ValueError, "^R: got rank r = 257, expected"),
    (
        {"R": torch.ones(R, D).long()},
        TypeError,
        "^R: got dtype torch.int64, expected a floating-point dtype",
    ),
    ({"W": torch.ones(R + 1, D)}, ValueError, r"^W: got shape \(4, 8\), expected \(3, 8\)"),
    (
        {"W": torch.ones(R, D, device="meta")},
        ValueError,
        "^W: got device meta, expected cpu, where hidden is",
    ),
    ({"W": 1.0}, TypeError, r"^W: got float 1.0, expected a tensor of shape \(3, 8\)"),
    ({"b": torch.ones(1, R)}, ValueError, r"^b: got shape \(1, 3\), expected \(3,\)"),
    ({"activation": "elu"}, ValueError, "^activation: got 'elu', expected one of linear, relu"),
    ({"activation": 3}, ValueError, "^activation: got 3, expected"),
    ({"rows": [0, 1]}, TypeError, r"^rows: got list .*expected an int32 tensor \[N\]"),
    (
        {"rows": torch.tensor([0, 1])},
        TypeError,
        "^rows: got dtype torch.int64, expected torch.int32",
    ),
    ({"rows": _i32(0, 1).view(1, 2)}, ValueError, r"^rows: got shape \(1, 2\), expected \[N\]"),
    ({"rows": _i32(0).to("meta")}, ValueError, "^rows: got device meta, expected cpu"),
    (
        {"rows": _i32(0, 6)},
        ValueError,
        r"^rows: got values from 0 to 6, expected row numbers in \[0, 6\)",
    ),
    ({"rows": _i32(-2, 1)}, ValueError, "^rows: got values from -2 to 1, expected"),
    (
        {"rows": _i32(4, -1, 2, -1, 4)},
        ValueError,
        "^rows: row 4 occurs more than once, expected each row at most once",
    ),
    ({"coeff": torch.ones(5, R)}, ValueError, r"^coeff: got shape \(5, 3\), expected \(6, 3\)"),
    (
        {"coeff": torch.ones(6, R), "rows": _i32(0, 1)},
        ValueError,
        r"^coeff: got shape \(6, 3\), expected \(2, 3\)",
    ),
    (
        {"weight_ids": _i32(*[0] * 6)},
        ValueError,
        r"^R: got shape \(3, 8\), expected \[S, r, 8\] \(with weight_ids\)",
    ),
    (
        {**SETS, "weight_ids": _i32(0, 1)},
        ValueError,
        r"^weight_ids: got shape \(2,\), expected \[6\]",
    ),
    (
        {**SETS, "weight_ids": _i32(0, 1, 2, 0, 0, 0)},
        ValueError,
        r"^weight_ids: got values from 0 to 2, expected set numbers in \[0, 2\)",
    ),
    (
        {**SETS, "weight_ids": _i32(0, -1, 1, 0, 0, 0)},
        ValueError,
        "^weight_ids: got values from -1 to 1, expected",
    ),
    (
        {**SETS, "weight_ids": torch.zeros(6)},
        TypeError,
        "^weight_ids: got dtype torch.float32, expected torch.int32",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=lambda value: None)
def test_bad_input_is_refused_and_nothing_is_written(change, error, message, backend):
    call = _call(change)
    hidden = call["hidden"]
    before = hidden.clone() if isinstance(hidden, torch.Tensor) else hidden
    with pytest.raises(error, match=message):
        rk.loreft(call.pop("hidden"), call.pop("R"), call.pop("W"), call.pop("b"), **call)
    assert torch.equal(before, hidden) if isinstance(hidden, torch.Tensor) else before is hidden


def test_a_good_call_passes():
    call = _call({"rows": _i32(5, -1, 0), "coeff": torch.ones(3, R)})
    hidden = call["hidden"]
    assert (
        rk.loreft(call.pop("hidden"), call.pop("R"), call.pop("W"), call.pop("b"), **call) is hidden
    )


def test_the_argument_is_named_as_the_function_names_it():
    hidden, weight, bias = torch.randn(2, D), torch.randn(R, D), torch.randn(R)
    for function, arguments, name in [
        (rk.direft, (weight, weight[:1], bias), "W"),
        (rk.nodireft, (weight, weight[:1], bias), "W1"),
        (rk.nodireft, (weight[0], weight, bias), "W2"),
        (rk.noreft, (weight, weight, bias[:1]), "b"),
        (rk.consreft, (weight, bias[:1]), "s"),
        (rk.lobireft, (weight[0], bias), "R"),
        (rk.red, (weight[0, :2], weight[0]), "scale"),
        (rk.red, (weight[0], weight[0, :2]), "bias"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: got shape .*expected"):
            function(hidden, *arguments)
    with pytest.raises(ValueError, match=r"^b2: got shape \(1,\), expected \(3,\)"):
        rk.noreft(hidden, weight, weight, bias, b2=bias[:1])
    with pytest.raises(
        ValueError, match=r"^scale: got shape \(8,\), expected \[S, 8\] \(with weight_ids\)"
    ):
        rk.red(hidden, weight[0], weight[0], weight_ids=_i32(0, 0))
    with pytest.raises(TypeError, match="^scale: got NoneType"):
        rk.red(hidden, None, weight[0], weight_ids=_i32(0, 0))


def test_row_values_are_checked_once_and_again_after_a_change():
    rows = _i32(0, 3, -1)
    calls = Calls()
    with calls:
        calls.names = []
        check_row_values(rows, 4)
        assert "aten::aminmax" in calls.names
        calls.names = []
        check_row_values(rows, 4)
        check_row_values(rows, 9)
        assert not calls.names  # rows that are valid for 4 rows are valid for more
    with pytest.raises(ValueError, match="^rows: got values from -1 to 3"):
        check_row_values(rows, 3)
    rows[0] = 3
    with pytest.raises(ValueError, match="^rows: row 3 occurs more than once"):
        check_row_values(rows, 4)
    assert check_row_values(mark_rows(rows, 4), 4) is rows  # marked rows are not checked


def test_no_values_are_read_in_a_layers_forward():
    """Rows that are marked as checked are not read on the host, so there is no synchronization."""
    rows = rk.positions.resolve("f1+l1", [3, 2], 3)
    calls = Calls()
    calls.names = []
    with calls:
        rk.loreft(
            torch.randn(2, 3, D), torch.randn(R, D), torch.randn(R, D), torch.randn(R), rows=rows
        )
    assert "aten::aminmax" not in calls.names
