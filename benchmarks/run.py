"""Run the suites, print each case as it is measured, and append the raw rows to CSV files.

    python -m benchmarks.run [--list] [--only SUITE ...] [--match WORD ...] [--quick] [--csv [FILE]]
        [--device cpu|cuda] [--rounds N]

``--csv`` without a file writes to ``benchmarks/results/<device>/<suite>.csv``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness, machine, rows, suites
from benchmarks.protocol import RunSettings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure reft_kernels and other implementations of ReFT.",
    )
    parser.add_argument("--list", action="store_true", help="list the suites and exit")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="SUITE",
        choices=suites.NAMES,
        default=list(suites.NAMES),
        help="suites to run (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use small shapes and few rounds, to test that everything works",
    )
    parser.add_argument(
        "--csv",
        nargs="?",
        type=Path,
        const=rows.RESULTS,
        metavar="FILE",
        help="append raw rows to FILE (default: one file per suite in benchmarks/results/<device>)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, help="samples per provider")
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="WORD",
        help="run only cases whose mode, shape and dtype contain every WORD",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 2 on invalid arguments."""
    args = _parser().parse_args(argv)
    if args.list:
        for number, name in enumerate(suites.NAMES, 1):
            suite = suites.load(name)
            print(f"{number}. {name}: {suite.TITLE}; {suite.ABOUT}")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device: got cuda, but PyTorch sees no GPU, expected cpu", file=sys.stderr)
        return 2
    if args.rounds is not None and args.rounds < 1:
        print(f"--rounds: got {args.rounds}, expected at least 1", file=sys.stderr)
        return 2
    settings = RunSettings(args.device, args.quick, args.rounds, tuple(args.match))
    started = time.perf_counter()
    for name in args.only:
        print(f"== {suites.load(name).TITLE}", flush=True)
        for case_rows in suites.measure(name, settings):
            harness.show(case_rows)
            sys.stdout.flush()
            if args.csv:
                rows.append(case_rows, _path(args.csv, name, args.device))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _path(csv: Path, suite: str, device: str) -> Path:
    return rows.folder(machine.device_name(device)) / f"{suite}.csv" if csv == rows.RESULTS else csv


if __name__ == "__main__":
    raise SystemExit(main())
