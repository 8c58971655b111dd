"""Rows with made-up values for the tests of the benchmark tools."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Measurement

_PLAIN = Measurement(
    suite="edit_all_rows",
    provider="reft_kernels",
    mode="forward",
    shape="rows=4096 d=4096 r=8",
    dtype="float32",
    device="some-cpu-2-threads",
    driver="",
    allocator="malloc",
    threads=2,
    torch="2.13.0",
    triton="",
    transformers="5.1",
    commit="abc1234",
    when="2026-01-01T00:00:00Z",
    rounds=9,
    median_ms=None,
    p20_ms=None,
    p80_ms=None,
    baseline="eager, unfolded",
    ratio=None,
    bytes=1_000_000,
    clone_fraction=None,
    graph_ms=None,
    launches=None,
    host_us=None,
    peak_bytes=None,
    error=None,
    allowed=None,
    note="",
)
GPU = {"device": "some-gpu", "allocator": "cuda", "driver": "570"}


def row(
    provider: str = "reft_kernels",
    median: float | None = None,
    spread: float = 0.05,
    **values: object,
) -> Measurement:
    """Return a row whose p20 and p80 lie ``spread`` below and above its median."""
    times = {}
    if median is not None:
        times = {
            "median_ms": median,
            "p20_ms": median * (1 - spread),
            "p80_ms": median * (1 + spread),
        }
    return dataclasses.replace(_PLAIN, provider=provider, **times | values)


def edits(**values: object) -> list[Measurement]:
    """Return one case of the first suite.

    reft_kernels is faster than eager and slower than torch.compile; pyreft is not installed.
    """
    return [
        row("torch.clone", 1.0, ratio=0.25, **values),
        row("reft_kernels", 2.0, ratio=0.5, clone_fraction=0.5, **values),
        row("eager, unfolded", 4.0, ratio=1.0, **values),
        row("torch.compile, folded", 1.25, ratio=0.3125, **values),
        row("pyreft", note="absent: pyreft is <not> installed", **values),
    ]


def write(folder: Path, measurements: list[Measurement]) -> Path:
    """Append rows to their device's file under ``folder`` and return ``folder``."""
    for measurement in measurements:
        rows.append([measurement], folder / measurement.device / "raw.csv")
    return folder
