"""Interleaved timing: every provider runs once a round, so that drift of a shared machine meets all of them alike."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One provider's result; times in milliseconds, ``ratio`` is the median of the round-by-round ratios to the baseline."""

    question: str
    provider: str
    shape: str
    dtype: str
    device: str
    threads: int
    torch: str
    commit: str
    rounds: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    baseline: str
    ratio: float


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def commit() -> str:
    """The repository's commit, with a plus where the working tree differs; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    head = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def device_name(device: str) -> str:
    """A folder-safe name of the device."""
    if device == "cuda":
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return "-".join("".join(c if c.isalnum() else " " for c in model).lower().split()) + f"-{torch.get_num_threads()}-threads"


def _calls_for(function: Callable[[], object], device: str) -> int:
    """How many calls one sample times: enough for 20 ms, so that a short provider is not timed on a long one's cold cache."""
    function()
    _synchronize(device)
    start = time.perf_counter()
    function()
    _synchronize(device)
    return max(1, min(1000, int(0.02 / max(time.perf_counter() - start, 1e-6))))


def compare(
    question: str, providers: dict[str, Callable[[], object]], baseline: str, *, shape: str, dtype: str, device: str,
    rounds: int, warmup: int = 2,
) -> list[Row]:  # fmt: skip
    """Time every provider in turn for ``rounds`` rounds and report medians and ratios to ``baseline``.

    Raises:
        KeyError: the baseline is not a provider.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    calls = {name: _calls_for(function, device) for name, function in providers.items()}
    for round_number in range(warmup + rounds):
        for name, function in providers.items():
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            _synchronize(device)
            if round_number >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3 / calls[name])
    base = times[baseline]
    rows = []
    for name, values in times.items():
        ordered = sorted(values)
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        rows.append(
            Row(
                question,
                name,
                shape,
                dtype,
                device_name(device),
                torch.get_num_threads(),
                torch.__version__,
                commit(),
                rounds,
                statistics.median(values),
                ordered[int(0.2 * (rounds - 1))],
                ordered[int(0.8 * (rounds - 1))],
                baseline,
                ratio,
            )  # fmt: skip
        )
    return rows


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    width = max(len(row.provider) for row in rows)
    print(f"{rows[0].question}: {rows[0].shape}, {rows[0].dtype}, {rows[0].device}; ratio to {rows[0].baseline}")
    for row in rows:
        spread = f"(p20 {row.p20_ms:.3f}, p80 {row.p80_ms:.3f})"
        print(f"  {row.provider:<{width}}  {row.median_ms:10.3f} ms {spread:<32} x {row.ratio:.4g}")


def append(rows: list[Row], path: Path) -> None:
    """Append rows to a CSV, with a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
