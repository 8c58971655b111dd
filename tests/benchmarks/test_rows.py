"""Tests of the CSV files of raw rows."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import rows
from tests.benchmarks import row


def test_round_trip(tmp_path):
    """Two appends are read back, with empty values, separators and quotes."""
    path = tmp_path / "device" / "raw.csv"
    measurements = [
        row(
            median=1.25,
            launches=3,
            peak_bytes=1 << 40,
            clone_fraction=0.5,
            error=1e-7,
            allowed=1e-6,
        ),
        row("eager, folded", note='wrong: "error", allowed\n1e-6'),
    ]
    rows.append(measurements[:1], path)
    rows.append(measurements[1:], path)
    assert rows.read(path) == measurements
    assert path.read_text().count("suite") == 1


def test_floats_keep_six_digits(tmp_path):
    rows.append([row(median=1.23456789)], tmp_path / "raw.csv")
    assert rows.read(tmp_path / "raw.csv")[0].median_ms == 1.23457


@pytest.mark.parametrize("content", ["", "suite,provider\n", "suite,provider\nedit,reft_kernels\n"])
def test_read_other_columns(tmp_path, content):
    path = tmp_path / "raw.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match="raw.csv: got columns .*, expected suite, provider, mode"):
        rows.read(path)


def test_append_leaves_other_columns_alone(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text("suite,provider\n")
    with pytest.raises(ValueError, match="got columns suite, provider, expected"):
        rows.append([row(median=1.0)], path)
    assert path.read_text() == "suite,provider\n"


def test_bad_number_names_line_and_column(tmp_path):
    path = tmp_path / "raw.csv"
    rows.append([row(median=1.0, launches=7), row(median=2.0, launches=77777)], path)
    path.write_text(path.read_text().replace("77777", "many"))
    with pytest.raises(
        ValueError, match=r"raw.csv, line 3, launches: got 'many', expected a number"
    ):
        rows.read(path)


def test_short_line_is_named(tmp_path):
    path = tmp_path / "raw.csv"
    rows.append([row(median=1.0)], path)
    with path.open("a") as file:
        file.write("edit_all_rows,reft_kernels\n")
    with pytest.raises(ValueError, match=r"line 3: got 2 values"):
        rows.read(path)


@pytest.mark.parametrize("newest_last", [True, False])
def test_latest_picks_the_newest_run(newest_last):
    old, new = row(median=1.0), row(median=2.0, when="2026-02-01T00:00:00Z")
    other = row("eager, folded", 3.0)
    latest = rows.latest([old, other, new] if newest_last else [new, other, old])
    assert latest == [new, other]


@pytest.mark.parametrize("absent_last", [True, False])
def test_latest_keeps_what_was_measured_where_the_package_is(absent_last):
    measured = row("adapters", 1.0)
    absent = row("adapters", note="absent: adapters is not installed", when="2026-02-01T00:00:00Z")
    wrong = row("adapters", note="wrong: error", when="2026-03-01T00:00:00Z")
    assert rows.latest([measured, absent] if absent_last else [absent, measured]) == [measured]
    assert rows.latest([measured, absent, wrong]) == [wrong]


@pytest.mark.parametrize(
    "name", ["suite", "device", "allocator", "dtype", "shape", "mode", "provider"]
)
def test_latest_keeps_other_cases(name):
    measurements = [
        row(median=1.0),
        dataclasses.replace(row(median=2.0, when="2026-02-01T00:00:00Z"), **{name: "a=b"}),
    ]
    assert rows.latest(measurements) == measurements


def test_dimensions():
    assert row().dimensions == {"rows": "4096", "d": "4096", "r": "8"}
