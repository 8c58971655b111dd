"""Run the suites, print each case as it is measured, and append the raw rows to CSV files.

    python -m benchmarks.run [--list] [--only SUITE ...] [--match WORD ...] [--cases LABEL ...]
        [--without WORD ...] [--quick] [--csv [FILE]] [--resume] [--device cpu|cuda] [--rounds N]
        [--seconds N]

``--csv`` without a file writes to ``benchmarks/results/<device>/<suite>.csv``. Rows are written
when their case is measured. With ``--seconds``, and on SIGTERM, the case at hand ends with the
rounds that it has. Exit status: 0 if every case was measured; 1 if a provider failed or was wrong;
2 for invalid arguments; 3 if the device no longer works; 4 if the run was cut off.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks import harness, machine, rows, stopping, suites
from benchmarks.protocol import RunSettings
from benchmarks.rows import Measurement


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
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="run only these cases, in this order, each named by mode, shape and dtype",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="WORD",
        help="leave out providers whose name contains a WORD",
    )
    parser.add_argument("--seconds", type=float, help="end the run after this time")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out cases whose rows are in the file of --csv, and providers that failed there",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status."""
    args = _parser().parse_args(argv)
    if args.list:
        for number, name in enumerate(suites.NAMES, 1):
            suite = suites.load(name)
            print(f"{number}. {name}: {suite.TITLE}; {suite.ABOUT}")
        return 0
    problem = _problem(args)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    stopping.install(args.seconds)
    started, failed = time.perf_counter(), False
    for name in args.only:
        file = _path(args.csv, name, args.device) if args.csv else None
        measured = rows.read(file) if args.resume and file and file.exists() else []
        try:
            settings = _settings(args, name, measured)
        except ValueError as error:
            print(f"--cases: {error}", file=sys.stderr)
            return 2
        if settings is None:
            print(f"{name}: every case is in {file}")
            continue
        print(f"== {suites.load(name).TITLE}", flush=True)
        try:
            for case_rows in suites.measure(name, settings):
                harness.show(case_rows)
                sys.stdout.flush()
                failed |= any(row.note.startswith((harness.FAILED, "wrong")) for row in case_rows)
                if file:
                    rows.append(case_rows, file)
                if stopping.requested():
                    break
        except Exception:  # of the suite itself; the others go on
            traceback.print_exc()
            failed = True
        if stopping.requested():
            break
    print(f"{time.perf_counter() - started:.0f} s")
    if stopping.requested():
        print(f"cut off: {stopping.requested()}", flush=True)
        return stopping.status()
    return int(failed)


def _problem(args: argparse.Namespace) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        return "--device: got cuda, but PyTorch sees no GPU, expected cpu"
    if args.rounds is not None and args.rounds < 1:
        return f"--rounds: got {args.rounds}, expected at least 1"
    if args.seconds is not None and args.seconds <= 0:
        return f"--seconds: got {args.seconds:g}, expected more than 0"
    if args.resume and args.csv is None:
        return "--resume: got no --csv, expected the file that has the earlier rows"
    return ""


def _settings(
    args: argparse.Namespace, suite: str, measured: list[Measurement]
) -> RunSettings | None:
    """Return the settings of a suite, or None if earlier rows answer all its cases.

    A case is measured again if one of its rows is missing or was cut off. A provider that failed is
    left out, because it would fail again.

    Raises:
        ValueError: If ``--cases`` names an unknown case.
    """
    settings = RunSettings(
        args.device,
        args.quick,
        args.rounds,
        tuple(args.match),
        tuple(args.cases),
        tuple(args.without),
    )
    if not measured:
        if args.cases:
            suites.specs(suite, settings)
        return settings
    cases: dict[str, list[Measurement]] = collections.defaultdict(list)
    for row in measured:
        if row.suite == suite and row.commit == machine.commit():
            cases[f"{row.mode} {row.shape} {row.dtype}"].append(row)
    failed = {
        label: frozenset(row.provider for row in found if row.note.startswith(harness.FAILED))
        for label, found in cases.items()
    }
    labels = [
        spec.label
        for spec in suites.specs(suite, settings)
        if not any(row.median_ms is not None for row in cases[spec.label])
        or any(row.note.startswith(harness.CUT_OFF) for row in rows.latest(cases[spec.label]))
    ]
    if not labels:
        return None
    return RunSettings(
        args.device,
        args.quick,
        args.rounds,
        labels=tuple(labels),
        without=tuple(args.without),
        failed=failed,
    )


def _path(csv: Path, suite: str, device: str) -> Path:
    return rows.folder(machine.device_name(device)) / f"{suite}.csv" if csv == rows.RESULTS else csv


if __name__ == "__main__":
    raise SystemExit(main())
