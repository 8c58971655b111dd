"""A run's log is read as far as it was written, and numbers are written as JSON that every
reader takes.
"""

from __future__ import annotations

import json
import warnings

import pytest
from reft_train.errors import UserError
from reft_train.files import dumps
from reft_train.reporting.log import read_log


def test_entries_come_in_order(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n\n{"step": 2, "loss": 1.5}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_log(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]


@pytest.mark.parametrize("half", [b'{"step": 2, "lo', b'{"text": "\xc3', b"[1,", b"12"])
def test_a_half_written_last_line_is_left_out_with_a_warning(tmp_path, half):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + half)
    with pytest.warns(UserWarning, match="line 2 was cut short"):
        assert read_log(path) == [{"step": 1}]


def test_a_whole_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}')
    assert read_log(path) == [{"step": 1}]


@pytest.mark.parametrize("content", ['{"step"\n{"step": 2}\n', '{"step": 2}\n[1]\n'])
def test_a_broken_line_that_was_finished_is_refused(tmp_path, content):
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^log: got line [12] of .*expected a JSON object$"):
        read_log(path)


def test_an_absent_log_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^log: got .*which cannot be read"):
        read_log(tmp_path / "log.jsonl")


def test_numbers_that_are_not_finite_become_null():
    text = dumps({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (float("-inf"), "NaN")}})
    refuse = pytest.fail
    assert json.loads(text, parse_constant=refuse) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": [None, "NaN"]},
    }
