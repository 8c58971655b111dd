"""Tests of the command lines benchmarks.run and benchmarks.tuning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness, rows, run, suites, tuning
from benchmarks.protocol import Case, RunSettings

ROOT = Path(__file__).resolve().parents[2]


def test_list_names_every_suite(capsys):
    assert run.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1].rstrip(":") for line in lines] == list(suites.NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "edit_selected_rows",
        "r_build",
        "host_cost",
        "trainer_step",
        "packing",
        "peft_methods",
        "many_adapters",
    ],
)
def test_a_quick_run_measures_the_suite(name, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    assert (
        run.main(
            ["--only", name, "--quick", "--csv", str(file), "--device", "cpu", "--rounds", "1"]
        )
        == 0
    )
    results = rows.read(file)
    assert {row.suite for row in results} == {name}
    ours = [row for row in results if row.provider.startswith(("reft_kernels", "packing"))]
    assert ours and all(row.median_ms for row in ours), [row.note for row in ours]
    assert not [row for row in results if row.note and not row.note.startswith("absent")]
    assert suites.load(name).TITLE in capsys.readouterr().out


def test_match_picks_cases(tmp_path):
    file = tmp_path / "rows.csv"
    arguments = [
        "--only",
        "host_cost",
        "--quick",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--match",
        "function=red",
        "both",
    ]
    assert run.main([*arguments, "--csv", str(file)]) == 0
    assert {(row.mode, row.shape) for row in rows.read(file)} == {("both", "function=red")}


@pytest.mark.parametrize(
    "arguments", [["--only", "nothing"], ["--rounds", "0"], ["--device", "tpu"]]
)
def test_bad_arguments(arguments, capsys):
    try:
        code = run.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and arguments[1] in capsys.readouterr().err


def test_an_unknown_suite():
    with pytest.raises(ValueError, match="suite: got 'nothing', expected one of edit_all_rows"):
        suites.load("nothing")


def test_tuning_tries_each_knob_alone():
    from reft_kernels.triton.edit import EditConfig

    present = EditConfig(16, 64, 16, 4, 4, 2, 2)
    found = tuning.adjacent(present)
    assert set(found) == {
        "block_n=8",
        "block_n=32",
        "block_d=32",
        "block_d=128",
        "num_warps=2",
        "num_warps=8",
        "read_stages=4",
        "write_stages=4",
    }
    assert found["block_d=32"] == EditConfig(16, 32, 16, 4, 4, 2, 2)


def test_tuning_proposes_only_what_beats_noise():
    case = Case("tuning", "forward", {"rows": 1}, torch.float32, {}, tuning.PRESENT)
    samples = {
        tuning.PRESENT: [1.0, 1.1, 0.9],
        "block_n=8": [0.5, 0.6, 0.5],
        "block_n=32": [0.95, 1.0, 0.8],
        "num_warps=8": [2.0, 2.0, 2.0],
    }
    proposed = tuning.proposals(
        harness.rows_of_samples(case, RunSettings(), samples, {"num_stages=4": "absent: spills"})
    )
    assert proposed == ["rows=1, float32, forward: block_n=8 takes 0.50 of the present"]


def test_tuning_needs_triton_to_run(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert tuning.main(["--device", "cpu"]) == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_tuning_changes_the_launch_and_puts_the_heuristic_back():
    """Run in a subprocess, because Triton's interpreter is selected at import."""
    code = """
import torch, reft_kernels
from benchmarks import edits, tuning
from reft_kernels import dispatch
module = tuning.kernel_module("edit")
heuristic = module.edit_config
problems = edits.draw(6, 16, 2, torch.float32, "cpu", 1)
with dispatch.backend("triton"), torch.no_grad():
    default = edits.provider(reft_kernels.loreft, problems, "forward", edits.EditGate(problems[0], backward=False))
    candidates = tuning.candidates(module, "edit_config", default.prepare, default.check)
    assert len(candidates) > 4, candidates
    for name in (tuning.PRESENT, "block_n=16"):
        verdict = candidates[name].check()
        assert verdict.error <= verdict.allowed, (name, verdict)
assert module.edit_config is heuristic
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
