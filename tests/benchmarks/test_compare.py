"""Tests of benchmarks.compare."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, rows
from tests.benchmarks import edits, row, write


@pytest.mark.parametrize(
    ("median", "spread", "expected"),
    [
        (0.90, 0.001, "faster"),
        (1.10, 0.001, "slower"),
        (1.00, 0.001, "within noise"),
        (1.029, 0.001, "within noise"),  # intervals do not overlap, but less than 3 % apart
        (1.031, 0.001, "slower"),
        (0.971, 0.001, "within noise"),
        (0.969, 0.001, "faster"),
        (1.50, 0.25, "within noise"),  # [0.75, 1.25] and [1.125, 1.875] overlap
        (2.00, 0.25, "slower"),
        (0.50, 0.25, "faster"),
    ],
)
def test_verdict(median, spread, expected):
    assert (
        compare.verdict(row(median=1.0, spread=spread), row(median=median, spread=spread))
        == expected
    )


def test_touching_intervals_overlap():
    a, b = row(median=1.0, p80_ms=1.1), row(median=1.25, p20_ms=1.1)
    assert compare.verdict(a, b) == compare.verdict(b, a) == "within noise"


def test_missing_quantiles_are_the_median():
    assert compare.interval(row(median=1.0, p20_ms=None, p80_ms=2.0)) == (1.0, 2.0)


def _files(tmp_path: Path, a: list, b: list) -> list[str]:
    for name, measurements in (("a.csv", a), ("b.csv", b)):
        rows.append(measurements, tmp_path / name)
    return [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]


def test_report(tmp_path, capsys):
    """The newest rows are matched, noise is hidden, and unmatched rows are listed.

    A row that has a time in one file only is listed, too.
    """
    a = [
        row(median=9.0, when="2025-01-01T00:00:00Z"),
        row(median=1.0),
        row("eager, unfolded", 4.0),
        row("old", 1.0),
    ]
    b = [row(median=2.0, spread=0.1), row("eager, unfolded", 4.01), row("new", 1.0)]
    a, b = (
        [*a, row("pyreft", 1.0), row("gone", note="absent: x")],
        [*b, row("pyreft", note="out of memory")],
    )
    b.append(row("gone", note="absent: x"))
    files = _files(tmp_path, a, b)
    assert compare.main(files) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert [line.split()[0] for line in lines[:2]] == ["slower", "no"]
    assert "x 2 [1.71, 2.32]" in lines[0] and lines[0].endswith("reft_kernels: 1 -> 2 ms")
    assert lines[1].endswith("pyreft: A 1 ms; B out of memory")
    assert [line for line in lines if line.startswith("only in A")][0].endswith(": old")
    assert [line for line in lines if line.startswith("only in B")][0].endswith(": new")
    assert lines[-1] == (
        "4 matched: 0 faster, 1 slower, 1 within noise, 2 without a time; 1 only in A, 1 only in B"
    )
    assert "eager" not in out and "gone" not in out
    assert compare.main([*files, "--all"]) == 0
    out = capsys.readouterr().out
    assert "within noise" in out.splitlines()[1] and "gone: A absent: x; B absent: x" in out


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 4}])
def test_other_machines_warn_and_go_on(tmp_path, capsys, change):
    assert compare.main(_files(tmp_path, [row(median=1.0)], [row(median=2.0, **change)])) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: different {next(iter(change))}: A ") and err.count("\n") == 1
    assert out.startswith("slower")


@pytest.mark.parametrize("name", ["dtype", "shape", "mode", "allocator", "suite"])
def test_other_cases_do_not_match(tmp_path, capsys, name):
    compare.main(_files(tmp_path, [row(median=1.0)], [row(median=2.0, **{name: "other=1"})]))
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 matched")


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n", b"\xff\xfe\x00"])
def test_bad_input(tmp_path, capsys, content):
    bad = tmp_path / "bad.csv"
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows.append([row(median=1.0)], tmp_path / "good.csv")
    assert compare.main([str(tmp_path / "good.csv"), str(bad)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("compare: ") and err.count("\n") == 1


def test_as_a_module(tmp_path):
    files = _files(tmp_path, [row(median=1.0)], [row(median=2.0)])
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.compare", *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("slower")


def test_behind():
    """Floors, rows within noise and incorrect providers do not count."""
    found = [*edits(), row("eager, folded", 1.9), row("adapters", note="wrong: error 1")]
    (loss,) = compare.behind(found)
    assert loss.own.provider == "reft_kernels" and [r.provider for r in loss.others] == [
        "torch.compile, folded"
    ]
    assert loss.factor == pytest.approx(1.6)


def test_behind_worst_first_and_without_a_time_before():
    cases = [
        row(median=2.0, mode="both"),
        row("eager", 1.0, mode="both"),
        row(median=3.0),
        row("eager", 1.0),
    ]
    cases += [row(note="out of memory", mode="backward"), row("eager", 1.0, mode="backward")]
    assert [loss.own.mode for loss in compare.behind(cases)] == ["backward", "forward", "both"]


def test_a_backend_not_chosen_counts_and_maps_do_not_race():
    found = [row(median=2.0), row("reft_kernels, torch backend", 1.0)]
    found += [
        row(f"reft_kernels {name}", time, suite="r_build")
        for name, time in (("householder", 2.0), ("cayley", 1.0))
    ]
    assert [loss.others[0].provider for loss in compare.behind(found)] == [
        "reft_kernels, torch backend"
    ]
    found.append(row("householder_product", 0.5, suite="r_build"))
    losses = [loss for loss in compare.behind(found) if loss.own.suite == "r_build"]
    assert [loss.own.provider for loss in losses] == [
        "reft_kernels householder",
        "reft_kernels cayley",
    ]


def test_devices(tmp_path):
    """All files are read, with the newest row of each case by the device that the rows name."""
    write(tmp_path, [row(median=1.0), row(median=2.0, device="z")])
    rows.append(
        [row(median=3.0, when="2027-01-01T00:00:00Z")],
        tmp_path / "some-cpu-2-threads" / "second.csv",
    )
    found = compare.devices(tmp_path)
    assert {device: [r.median_ms for r in own] for device, own in found.items()} == {
        "some-cpu-2-threads": [3.0],
        "z": [2.0],
    }
    with pytest.raises(FileNotFoundError, match="no such folder"):
        compare.devices(tmp_path / "absent")
