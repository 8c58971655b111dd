"""Pytest plugin: one share of the tests, in order of value, each result written at once.

    pytest -p benchmarks.gpu_pass.shards --shard 0/8 --results FOLDER -m gpu

Tests of the kernels come first, then those of the public functions, those of the reference on the
device, and those of ``torch.compile``, which take longest. Every ``N``-th test of that order is in
a share, so all shares advance at the same pace. ``FOLDER/K.tsv`` receives a line when a test starts
and one when it ends; tests with an end in any file of the folder are left out. If a test leaves the
device unusable, the process ends with status 3, because every further test would fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DEVICE_FAILED = 3
COUNT_FILE = "collected.txt"
MESSAGE = 4000  # characters of a failure that are kept
ENDS = ("passed", "failed", "skipped", "crashed")


def rank(name: str) -> int:
    """Return the place of a test in the order of value; 0 is first."""
    if name.startswith("tests/compile/"):
        return 3
    if name.startswith(("tests/triton/", "tests/cuda/")):
        return 0
    return 2 if "torch-cuda" in name or name.startswith("tests/reft_train/") else 1


def results(folder: Path) -> dict[str, str]:
    """Return the last state of each test: ``started``, ``passed``, ``failed``, ``skipped``."""
    states: dict[str, str] = {}
    for file in sorted(folder.glob("*.tsv")):
        for line in file.read_text(errors="replace").splitlines():
            state, _, rest = line.partition("\t")
            name = rest.partition("\t")[0]
            if state in (*ENDS, "started") and not (state == "started" and name in states):
                states[name] = state
    return states


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this plugin."""
    parser.addoption("--shard", default="0/1", help="share K of N, as K/N")
    parser.addoption("--results", type=Path, help="folder of the results")


class _Shard:
    def __init__(self, config: pytest.Config) -> None:
        number, _, count = config.getoption("--shard").partition("/")
        self.number, self.count = int(number), int(count)
        self.folder: Path = config.getoption("--results")
        self.folder.mkdir(parents=True, exist_ok=True)

    def _write(self, state: str, name: str, message: str = "") -> None:
        with (self.folder / f"{self.number}.tsv").open("a") as file:
            file.write(f"{state}\t{name}\t{message!r}\n" if message else f"{state}\t{name}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if self.number == 0:
            (self.folder / COUNT_FILE).write_text(f"{len(items)}\n")
        items.sort(key=lambda item: rank(item.nodeid))
        ended = {name for name, state in results(self.folder).items() if state in ENDS}
        chosen = [
            item
            for place, item in enumerate(items)
            if place % self.count == self.number and item.nodeid not in ended
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._write("started", item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            message = "" if report.passed else str(report.longrepr)[-MESSAGE:]
            self._write(report.outcome, report.nodeid, message)
        if report.failed and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except Exception as error:
                print(f"\nthe device failed in {report.nodeid}: {error}", flush=True)
                os._exit(DEVICE_FAILED)


def pytest_configure(config: pytest.Config) -> None:
    """Register the share."""
    if config.getoption("--results"):
        config.pluginmanager.register(_Shard(config), "gpu-pass-shard")
