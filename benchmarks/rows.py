"""Benchmark results and the CSV files that store them.

The files are only appended to, never edited by hand.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """The result of one provider on one case of a suite.

    A value is None where it does not apply or could not be measured.

    Attributes:
        suite: Name of the suite's module, e.g. ``edit_all_rows``.
        provider: The implementation, e.g. ``reft_kernels``, ``eager, folded``, ``pyreft``.
        mode: ``forward``, ``backward``, ``both``, ``inside``, ``step``, ``prefill``, ``decode``,
            ``call`` or ``start``.
        shape: ``name=value`` pairs, separated by spaces.
        dtype: Dtype of the hidden state.
        device: Name of the GPU or CPU. The name of a CPU includes the number of threads.
        driver: Version of the GPU driver.
        allocator: ``malloc`` or ``huge pages`` on a CPU, ``cuda`` on a GPU.
        threads: Number of PyTorch's intra-op threads.
        torch, triton, transformers: Package versions.
        commit: Commit of this repository, followed by a plus sign if tracked files had changes.
        when: Start of the run in UTC.
        rounds: Number of samples; fewer than asked for if the run was cut off.
        median_ms, p20_ms, p80_ms: Time of one call, including host time.
        baseline: The provider that ``ratio`` refers to.
        ratio: Median over the rounds of the time divided by the baseline's time in the same round.
        bytes: Minimum memory traffic of one call: each input read once, each output written once.
        clone_fraction: Bandwidth ``bytes / median`` divided by the bandwidth of ``torch.clone`` of
            the hidden state in the same rounds.
        graph_ms: Time of one call inside a CUDA graph, which excludes host time.
        launches: Kernels per call on a GPU, operators that reach the CPU backend on a CPU.
        host_us: Microseconds until the call returns to Python, without synchronization.
        peak_bytes: Peak of allocated memory during a call, above the memory held before it.
        error, allowed: Largest error against fp64 and the largest that is accepted, both relative
            to the largest reference value.
        note: Why there is no time, or why a part of the row is missing.
    """

    suite: str
    provider: str
    mode: str
    shape: str
    dtype: str
    device: str
    driver: str
    allocator: str
    threads: int
    torch: str
    triton: str
    transformers: str
    commit: str
    when: str
    rounds: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    baseline: str
    ratio: float | None
    bytes: int | None
    clone_fraction: float | None
    graph_ms: float | None
    launches: int | None
    host_us: float | None
    peak_bytes: int | None
    error: float | None
    allowed: float | None
    note: str

    @property
    def dimensions(self) -> dict[str, str]:
        """The ``name=value`` pairs of the shape as a dict."""
        return dict(pair.split("=", 1) for pair in self.shape.split())

    @property
    def key(self) -> tuple[str, ...]:
        """The columns that identify a case and a provider."""
        return (
            self.suite,
            self.device,
            self.allocator,
            self.dtype,
            self.shape,
            self.mode,
            self.provider,
        )


_NUMBERS = {"int": int, "float": float, "int | None": int, "float | None": float}


def append(rows: Iterable[Measurement], path: Path) -> None:
    """Append rows to a CSV file, with a header if the file is new.

    Raises:
        ValueError: If the file has other columns.
    """
    names = [field.name for field in fields(Measurement)]
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or not path.stat().st_size
    if not new:
        with path.open(newline="") as file:
            _same_columns(next(csv.reader(file)), path)
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(names)
        for row in rows:
            writer.writerow([_written(getattr(row, name)) for name in names])
        file.flush()
        os.fsync(file.fileno())  # the machine may be taken back at any time


def _written(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _same_columns(columns: list[str], path: Path) -> None:
    expected = [field.name for field in fields(Measurement)]
    if columns != expected:
        raise ValueError(
            f"{path}: got columns {', '.join(columns)}, expected {', '.join(expected)}"
        )


def read(path: Path) -> list[Measurement]:
    """Read all rows of a CSV file, in order.

    Raises:
        ValueError: If the columns differ or a numeric field holds no number. The message names the
            line.
    """
    with path.open(newline="") as file:
        lines = csv.reader(file)
        _same_columns(next(lines, []), path)
        return [_row(line, number, path) for number, line in enumerate(lines, 2)]


def _row(line: list[str], number: int, path: Path) -> Measurement:
    values: dict[str, object] = {}
    if len(line) != len(fields(Measurement)):
        raise ValueError(
            f"{path}, line {number}: got {len(line)} values, expected {len(fields(Measurement))}"
        )
    for field, text in zip(fields(Measurement), line, strict=True):
        kind = _NUMBERS.get(str(field.type))
        try:
            values[field.name] = text if kind is None else None if text == "" else kind(text)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}, {field.name}: got {text!r}, expected a number"
            ) from None
    return Measurement(**values)


def latest(rows: Iterable[Measurement]) -> list[Measurement]:
    """Keep the newest row of each case and provider, in order of first appearance.

    A row whose provider was absent does not replace an older measurement, because some packages are
    installed only in separate environments.
    """

    def rank(row: Measurement) -> tuple[bool, str]:
        return not row.note.startswith("absent"), row.when

    newest: dict[tuple[str, ...], Measurement] = {}
    for row in rows:
        if row.key not in newest or rank(row) >= rank(newest[row.key]):
            newest[row.key] = row
    return list(newest.values())


def folder(device: str) -> Path:
    """Return the folder of a device's CSV files."""
    return RESULTS / device
