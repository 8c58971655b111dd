"""The result of one measurement, and the files that keep them: raw CSVs, appended and never
edited by hand.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider's answer to one case of a suite; an empty value means that it does not apply or
    could not be had.

    Attributes:
        suite: name of the suite's file, e.g. ``edit_all_rows``. provider: who did the work, e.g.
        ``reft_kernels``, ``eager, folded``, ``pyreft``. mode: ``forward``, ``backward``, ``both``,
        ``step``, ``prefill``, ``decode``, ``call`` or ``start``.
        shape: ``name=value`` pairs, separated by spaces.
        dtype: of the hidden state.
        device: name of the GPU or CPU, CPUs with their thread count.
        driver: the GPU driver's version.
        allocator: how the CPU's memory was had: ``malloc`` or ``huge pages``; ``cuda`` on a GPU.
        threads: PyTorch's intra-operator threads.
        torch, triton, transformers, commit: versions; a commit with a plus had changes beside it.
        when: start of the run, UTC.
        rounds: samples behind the median.
        median_ms, p20_ms, p80_ms: one call, host included.
        baseline: the provider that ``ratio`` refers to.
        ratio: median over the rounds of time over the baseline's time in the same round. bytes:
        least traffic of one call: inputs read once, outputs written once. clone_fraction: ``bytes /
        median`` over the same of ``torch.clone`` of the hidden state in the same rounds.
        graph_ms: one call inside a CUDA graph, that is without the host. launches: kernels on a
        GPU, operators that reach the CPU backend on a CPU, in one call. host_us: microseconds until
        the call returns to Python, nothing waited for. peak_bytes: the most memory allocated above
        what stood before the call. error, allowed: largest error against fp64 and what the gate
        allows, both over the largest exact value.
        note: why there is no time.
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
        """The shape's ``name=value`` pairs."""
        return dict(pair.split("=", 1) for pair in self.shape.split())

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows answers to the same case by the same provider."""
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


def append(rows: Iterable[Row], path: Path) -> None:
    """Append rows to a CSV, with a header when it is new.

    Raises:
        ValueError: the file has other columns.
    """
    names = [field.name for field in fields(Row)]
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


def _written(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _same_columns(found: list[str], path: Path) -> None:
    expected = [field.name for field in fields(Row)]
    if found != expected:
        raise ValueError(f"{path}: got columns {', '.join(found)}, expected {', '.join(expected)}")


def read(path: Path) -> list[Row]:
    """All rows of a CSV, in order.

    Raises:
        ValueError: other columns, or a value that is no number where one belongs; names the line.
    """
    with path.open(newline="") as file:
        lines = csv.reader(file)
        _same_columns(next(lines, []), path)
        return [_row(line, number, path) for number, line in enumerate(lines, 2)]


def _row(line: list[str], number: int, path: Path) -> Row:
    values: dict[str, object] = {}
    if len(line) != len(fields(Row)):
        raise ValueError(
            f"{path}, line {number}: got {len(line)} values, expected {len(fields(Row))}"
        )
    for field, text in zip(fields(Row), line, strict=True):
        kind = _NUMBERS.get(str(field.type))
        try:
            values[field.name] = text if kind is None else None if text == "" else kind(text)
        except ValueError:
            raise ValueError(
                f"{path}, line {number}, {field.name}: got {text!r}, expected a number"
            ) from None
    return Row(**values)


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that answer the same case by the same provider, the one of the newest run; order of
    first appearance.

    A provider that is absent leaves what it was measured at: some packages live in environments of
    their own.
    """

    def rank(row: Row) -> tuple[bool, str]:
        return not row.note.startswith("absent"), row.when

    newest: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row.key not in newest or rank(row) >= rank(newest[row.key]):
            newest[row.key] = row
    return list(newest.values())


def folder(device: str) -> Path:
    """Where the raw rows of a device lie."""
    return RESULTS / device
