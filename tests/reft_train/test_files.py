"""Files and folders that are replaced in one step, and the peak of memory."""

from __future__ import annotations

import mmap
import os

import pytest
import torch
from reft_train import files
from reft_train.memory import PeakMeter


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
