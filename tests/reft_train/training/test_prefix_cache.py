"""``--prefix-cache``: the losses of a run without it, what it logs, and what it refuses."""

from __future__ import annotations

import pytest
from reft_train.config import build
from reft_train.errors import UserError

from tests.reft_train.runs import instructions, logged, run, write_rows


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", instructions(8))


@pytest.mark.parametrize("edits", [{"positions": "l2"}, {"positions": "f2+l2", "layers": [1]}])
def test_a_run_logs_the_same_losses_and_what_it_kept(tiny_llama, rows, tmp_path, capsys, edits):
    settings = {"train": rows, "epochs": 3, "skip_test": True, **edits}
    assert run(tiny_llama, tmp_path / "plain", **settings) == 0
    assert run(tiny_llama, tmp_path / "kept", prefix_cache=0.1, **settings) == 0
    plain, kept = (logged(tmp_path / name) for name in ("plain", "kept"))
    assert len(plain) == 3
    assert [loss for _, loss in kept] == pytest.approx([loss for _, loss in plain], rel=1e-4)
    rates = [rate for _, rate in logged(tmp_path / "kept", "prefix_hit_rate")]
    assert rates == pytest.approx([0, 1 / 2, 2 / 3], abs=1e-4)
    assert logged(tmp_path / "kept", "prefix_bytes")[-1][1] > 0
    assert "prefix states: 16 of 24 rows found (67%)" in capsys.readouterr().err
    assert logged(tmp_path / "plain", "prefix_hit_rate") == []


def test_positions_that_leave_nothing_to_keep(tiny_llama, rows, tmp_path, capsys):
    code = run(tiny_llama, tmp_path / "run", train=rows, positions="f2+l2", prefix_cache=1)
    assert code == 2
    assert "prefix_cache: positions: adapter 'default' edits the first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"packing": True}, "prefix_cache: got 1 with packing, expected 0"),
        ({"compile": True}, "prefix_cache: got 1 with compile, expected 0"),
        ({"fsdp": True}, "prefix_cache: got 1 with fsdp, expected 0"),
        ({"method": "lora"}, "prefix_cache: got 1 with method lora, expected 0"),
        ({"prefix_cache": -1}, "prefix_cache: got -1"),
    ],
)
def test_settings_that_do_not_fit(other, message):
    settings = {"model": "m", "task": "jsonl", "prefix_cache": 1, **other}
    with pytest.raises(UserError, match=message):
        build(settings)
