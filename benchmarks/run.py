"""Run the suites, print each case as it is measured, and append the raw rows.

    python -m benchmarks.run [--list] [--only SUITE ...] [--match WORD ...] [--quick] [--csv [FILE]]
        [--device cpu|cuda] [--rounds N]

With ``--csv`` rows go to ``benchmarks/results/<device>/<suite>.csv``, or to the one file that is
named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness, machine, rows, suites


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure reft_kernels beside its rivals."
    )
    parser.add_argument("--list", action="store_true", help="name the suites and end")
    parser.add_argument(
        "--only", nargs="+", metavar="SUITE", choices=suites.NAMES, default=list(suites.NAMES)
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few rounds, to see that everything works",
    )
    parser.add_argument(
        "--csv",
        nargs="?",
        type=Path,
        const=rows.RESULTS,
        help="append raw rows (to one FILE, if named)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, help="samples of each provider")
    parser.add_argument(
        "--match",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only cases whose mode, shape, dtype have each word",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 on bad input."""
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
    settings = harness.Settings(args.device, args.quick, args.rounds, tuple(args.match))
    started = time.perf_counter()
    for name in args.only:
        print(f"== {suites.load(name).TITLE}", flush=True)
        for found in suites.answers(name, settings):
            harness.show(found)
            sys.stdout.flush()
            if args.csv:
                rows.append(found, _path(args.csv, name, args.device))
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def _path(csv: Path, suite: str, device: str) -> Path:
    return rows.folder(machine.device_name(device)) / f"{suite}.csv" if csv == rows.RESULTS else csv


if __name__ == "__main__":
    raise SystemExit(main())
