"""Profile the calls of :mod:`benchmarks.profiled` with ncu and count the profiled kernels.

    python -m benchmarks.gpu_pass.profile --out FOLDER --name NAME --ncu PATH [--cases NAME ...]
        [--seconds N] [--device cuda]

The kernels are limited by an NVTX range. If ncu finds none in it, it runs once more, limited by
``cudaProfilerStart`` instead. ``FOLDER/NAME.csv`` has one line per kernel and metric. With
``--device cpu`` the calls run once without a profiler. Exit status: 0 with at least one kernel.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__time_duration.sum",
    "launch__registers_per_thread",
    "lts__t_bytes.sum",
    "launch__grid_size",
    "launch__block_size",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
# tried in turn until one finds kernels; the second needs fewer features and metrics
ATTEMPTS = {
    "nvtx": (("--nvtx", "--nvtx-include", "profiled"), METRICS),
    "profiler-start": (("--nvtx", "--profile-from-start", "off"), METRICS[:5]),
}


def command(ncu: str, chosen: str, file: Path, cases: list[str]) -> list[str]:
    """Return the command line of ncu."""
    profiled = [sys.executable, "-m", "benchmarks.profiled", "--device", "cuda"]
    profiled += ["--cases", *cases] if cases else []
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(file)]
    limits, metrics = ATTEMPTS[chosen]
    return [ncu, *options, *limits, "--metrics", ",".join(metrics), *profiled]


def kernels(file: Path) -> int:
    """Return the number of profiled kernels in a CSV file of ncu.

    The file has one line per kernel after a header and, in ncu's raw page, a line of units; lines
    that ncu prints about its own progress start with ``==``.
    """
    if not file.exists():
        return 0
    text = [line for line in file.read_text(errors="replace").splitlines() if line[:2] != "=="]
    return sum(bool(line) and line[0].isdigit() for line in csv.reader(text) if line)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_pass.profile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="ncu")
    parser.add_argument("--ncu", default="ncu")
    parser.add_argument("--cases", nargs="+", default=[])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        calls = [sys.executable, "-m", "benchmarks.profiled", "--device", "cpu", "--quick"]
        return subprocess.run(calls, cwd=ROOT, check=False).returncode
    deadline, file = time.monotonic() + args.seconds, args.out / f"{args.name}.csv"
    for chosen in ATTEMPTS:
        line = command(args.ncu, chosen, file, args.cases)
        print(" ".join(line), flush=True)
        try:
            status = subprocess.run(
                line, cwd=ROOT, check=False, timeout=max(1.0, deadline - time.monotonic())
            ).returncode
        except subprocess.TimeoutExpired:
            print(f"ncu was stopped after {args.seconds:g} s", flush=True)
            return int(not kernels(file))
        print(f"{kernels(file)} kernels profiled, limited by {chosen}, ncu's status {status}")
        if kernels(file):
            return 0
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
