"""Run the tests that need a GPU in several processes, and count them.

    python -m benchmarks.gpu_pass.run_tests --results FOLDER [--workers N] [--seconds N]
        [--collect-only] [--paths PATH ...] [-- PYTEST ARGUMENTS]

Without a GPU, ``--collect-only`` collects what a GPU would run
(:mod:`benchmarks.gpu_pass.assumed_gpu`).
No test at all is an error. A process that dies is started again without the test that killed it.
Exit status: 0 if all tests passed; 4 if some have not run; 1 if one failed or none was found.
"""

from __future__ import annotations

import argparse
import collections
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_pass import shards
from benchmarks.stopping import CUT_OFF

ROOT = Path(__file__).resolve().parents[2]
# folders that hold tests marked gpu; the rehearsal compares their count with that of all tests
FOLDERS = ("triton", "cuda", "compile", "related_methods", "reft_train/training")
MOST_WORKERS = 12
MOST_RESTARTS = 5
PYTEST = (
    sys.executable,
    "-m",
    "pytest",
    "-p",
    "no:cacheprovider",
    "-p",
    "benchmarks.gpu_pass.shards",
)
NO_TESTS = 5  # pytest's exit status
SANITIZER_FOUND = 9
SANITIZER = ("--error-exitcode", str(SANITIZER_FOUND), "--launch-timeout", "60")


def paths() -> list[str]:
    """Return the paths that hold tests marked ``gpu``."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    return [f"tests/{folder}" for folder in FOLDERS] + files


def _workers(wanted: int | None) -> int:
    return wanted or max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))


class _Worker:
    """A pytest process that runs one share."""

    def __init__(
        self, number: int, count: int, folder: Path, arguments: list[str], under: list[str]
    ) -> None:
        self.number, self.folder, self.restarts = number, folder, 0
        self.log, self.under = folder / f"{number}.log", under
        self.command = [*under, *PYTEST, "--shard", f"{number}/{count}", "--results", str(folder)]
        self.command += arguments
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT
            )

    def finished(self) -> bool:
        """Return whether the share has ended. A process that died is started again."""
        status = self.process.poll()
        if status is None:
            return False
        if status in (0, 1, NO_TESTS) or self.under or self.restarts == MOST_RESTARTS:
            return True
        own = self.folder / f"{self.number}.tsv"
        lines = own.read_text(errors="replace").splitlines() if own.exists() else []
        if not lines:  # it ended before its first test: a new start would end the same way
            return True
        state, _, rest = lines[-1].partition("\t")
        if state == "started":
            with own.open("a") as file:
                file.write(f"crashed\t{rest}\t'the process ended with status {status}'\n")
        self.restarts += 1
        self._start()
        return False


def _summary(folder: Path, cut: bool) -> int:
    states = shards.results(folder)
    counts = collections.Counter(states.values())
    count_file = folder / shards.COUNT_FILE
    collected = int(count_file.read_text()) if count_file.exists() else 0
    left = collected - sum(counts[state] for state in shards.ENDS)
    print(
        f"GPU tests: {collected} collected, {counts['passed']} passed, {counts['failed']} failed, "
        f"{counts['crashed']} crashed, {counts['skipped']} skipped, {left} not run"
    )
    for name, state in states.items():
        if state in ("failed", "crashed"):
            print(f"  {state}: {name}")
    if not count_file.exists() and cut:
        print("cut off before the tests were collected")
        return CUT_OFF
    if not collected:
        print("no GPU test was collected: see the logs", flush=True)
        for log in sorted(folder.glob("*.log"))[:1]:
            print(log.read_text(errors="replace")[-3000:])
        return 1
    if cut or left > 0:
        return CUT_OFF
    return int(counts["failed"] + counts["crashed"] > 0)


def collect(arguments: list[str], chosen: list[str], gpu: bool) -> int:
    """Return the number of GPU tests in the paths, or -1 if a module cannot be imported."""
    plugin = [] if gpu else ["-p", "benchmarks.gpu_pass.assumed_gpu"]
    done = subprocess.run(
        [*PYTEST, *plugin, "--collect-only", "-qq", "-m", "gpu", *arguments, *chosen],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if done.returncode not in (0, NO_TESTS):
        print(done.stdout[-4000:] + done.stderr[-4000:])
        return -1
    # with -qq pytest prints "file: number"
    pairs = (
        line.rpartition(": ") for line in done.stdout.splitlines() if line.startswith("tests/")
    )
    return sum(int(number) for _, _, number in pairs if number.isdigit())


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_pass.run_tests")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--collect-only", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--paths", nargs="+")
    parser.add_argument("--markers", default="gpu")
    parser.add_argument("--under", help="run the tests under this compute-sanitizer")
    parser.add_argument("--tool", default="memcheck", help="of compute-sanitizer")
    parser.add_argument("rest", nargs="*", help="further arguments of pytest")
    args = parser.parse_args(argv)
    chosen = args.paths or paths()
    if args.collect_only:
        count = collect(args.rest, chosen, args.device == "cuda")
        print(f"GPU tests: {max(count, 0)} collected", flush=True)
        return int(count <= 0)
    args.results.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.seconds
    count = _workers(args.workers)
    arguments = ["-m", args.markers, *args.rest, *chosen]
    under = [args.under, "--tool", args.tool, *SANITIZER] if args.under else []
    workers = [_Worker(number, count, args.results, arguments, under) for number in range(count)]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    running = list(workers)
    while running and not stopped and time.monotonic() < deadline:
        time.sleep(0.2)
        running = [worker for worker in running if not worker.finished()]
    for worker in running:
        worker.process.kill()  # each result is written already
    for worker in running:
        worker.process.wait()
    status = _summary(args.results, bool(running))
    for worker in workers if under else ():
        found = worker.process.returncode
        if found == SANITIZER_FOUND:
            status = 1
        print(f"{args.tool} ended with status {found}, {SANITIZER_FOUND} is an error that it found")
        print(worker.log.read_text(errors="replace")[-3000:], flush=True)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
