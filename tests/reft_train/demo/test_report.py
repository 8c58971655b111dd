"""What a run leaves behind: files written in one step, a table that lines up, a report that
needs nothing else.
"""

from __future__ import annotations

import json
import mmap
import os

import pytest
import torch
from reft_train import files
from reft_train.demo.datasets import Dataset, Example
from reft_train.demo.report import write_report
from reft_train.demo.results import Result, StepTimes
from reft_train.demo.settings import Settings
from reft_train.demo.table import notes, render, rows
from reft_train.demo.variants import VARIANTS
from reft_train.memory import Peak, PeakMeter
from reft_train.reporting.plots import smoothed

SETTINGS = Settings("model", [0, 1], 4, "all", 1, 0, 1e-3, 1e-2, 8, 16, "cpu", 2, 5)
DATASET = Dataset(
    [Example("a", "<x>"), Example("b", "y")], [Example("c", "<x>")], ["<x>", "y"], "two <texts>"
)
TIMES = StepTimes(0.1, dict.fromkeys(VARIANTS, 0.12), dict.fromkeys(VARIANTS, 1.2), 5)
PEAK = Peak(500.0, 612.5, "measured somehow")
RESULTS = [Result(name, 1234, 56, 0.75, [2.0, 1.0, 0.5], 3.25, PEAK) for name in VARIANTS]


def test_table_lines_up_and_says_what_was_measured():
    text = render(rows(RESULTS, TIMES, DATASET))
    lines = text.splitlines()
    assert len(lines) == 2 + 1 + len(VARIANTS) and len({len(line) for line in lines}) == 1
    assert "100.0%" in lines[2]  # the most frequent label's accuracy
    for piece in ("1,234", "56", "75.0%", "1.20", "612 MiB (+112)"):
        assert piece in lines[-1]
    assert "measured somehow" in notes(RESULTS, TIMES, SETTINGS)[1]


def test_report_is_self_contained_and_escaped(tmp_path):
    table = rows(RESULTS, TIMES, DATASET)
    captions = notes(RESULTS, TIMES, SETTINGS)
    checks = ["a <check>"]
    png, html, numbers = write_report(
        tmp_path / "out", RESULTS, TIMES, table, captions, checks, DATASET, SETTINGS
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    assert "data:image/png;base64," in page and "http" not in page
    assert (
        "two &lt;texts&gt;" in page and "a &lt;check&gt;" in page and "<td>&lt;x&gt;</td>" in page
    )
    assert json.loads(numbers.read_text())["results"][0]["losses"] == [2.0, 1.0, 0.5]
    assert sorted(os.listdir(tmp_path / "out")) == ["loss.png", "report.html", "results.json"]


def test_smoothing_starts_at_the_first_loss_and_keeps_a_constant():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([4.0, 0.0])[0] == 4.0


def test_results_survive_the_way_between_processes():
    assert Result.from_json(RESULTS[0].to_json()) == RESULTS[0]
    assert Settings.from_json(SETTINGS.to_json()) == SETTINGS


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "deep" / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        files.write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]


def test_a_folder_replaces_another(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    files.replace_folder(tmp_path / "one", tmp_path / "target")
    files.replace_folder(tmp_path / "two", tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"] and os.listdir(tmp_path / "target") == ["two"]


def test_peak_memory_sees_what_came_and_went():
    meter = PeakMeter(torch.device("cpu"))
    meter.start()
    with mmap.mmap(-1, 64 * 2**20) as fresh:  # malloc may hold that much already
        for _ in range(64):
            fresh.write(b"1" * 2**20)
    peak = meter.stop()
    assert peak.peak >= 60 and "resident" in peak.method
    if os.path.exists("/proc/self/clear_refs"):
        assert 50 <= peak.peak - peak.before <= 120
