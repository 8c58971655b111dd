"""Rehearse the whole GPU pass without a GPU, cut it off once, and check what it leaves.

    python -m benchmarks.gpu_pass.rehearsal [--folder FOLDER] [--whole]

The pass runs with tiny inputs on the CPU, in an environment without the packages that a machine
with a GPU may lack. It is ended by SIGTERM in the middle of a measurement, its output folder is
emptied, and the same command goes on. Checked are: the budgets, the number of GPU tests, the number
of files, that rows measured before the cut are in the archives, that nothing is measured twice, and
that each row names versions, device and commit. ``--whole`` compares the number of GPU tests with
that of all test files, too. Exit status: 0 if all checks hold, else 1.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import rows
from benchmarks.gpu_pass import absent_packages, plan, run_tests

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 600
STRETCH = "5"  # the budgets are those of a machine with a GPU and many cores
CUT_PART, CUT_FILE = "edits", "edit_all_rows.csv"
ROW_FILES = (
    (CUT_PART, CUT_FILE),
    (CUT_PART, "edit_selected_rows.csv"),
    ("operators", "r_build.csv"),
    ("operators", "host_cost.csv"),
    ("step", "training_step.csv"),
)


class RehearsalFailed(Exception):
    """A check does not hold."""


def _check(holds: object, message: str) -> None:
    if not holds:
        raise RehearsalFailed(message)


class Rehearsal:
    """A rehearsal in a folder."""

    def __init__(self, folder: Path) -> None:
        self.out, self.state = folder / "out", folder / "state"
        hidden = absent_packages.folder(folder)
        path = os.pathsep.join([str(hidden), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | {
            "PYTHON": sys.executable,
            "PYTHONPATH": path.strip(os.pathsep),
            "OUT": str(self.out),
            "STATE": str(self.state),
            "OMP_NUM_THREADS": "1",
        }
        self.environment.pop("TRITON_INTERPRET", None)

    def _start(self, log: Path, *arguments: str) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(
                ["bash", "benchmarks/gpu_pass.sh", "--rehearse", "--stretch", STRETCH, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def cut_off(self, log: Path) -> str:
        """Run until the first row of ``CUT_PART`` is written, end the pass, return its output."""
        process = self._start(log, "--fresh")
        deadline = time.monotonic() + LIMIT_SECONDS
        file = self.state / CUT_PART / CUT_FILE
        try:
            while process.poll() is None and time.monotonic() < deadline:
                if file.exists() and len(file.read_text().splitlines()) > 1:
                    break
                time.sleep(0.05)
            _check(process.poll() is None, f"the pass ended before {CUT_FILE}\n{log.read_text()}")
            process.send_signal(signal.SIGTERM)
            status = process.wait(30)
        finally:
            _end(process)
        text = log.read_text()
        _check(status == 143, f"status after SIGTERM: got {status}, expected 143\n{text}")
        return text

    def go_on(self, log: Path) -> str:
        """Run the same command again and return its output."""
        process = self._start(log)
        try:
            status = process.wait(LIMIT_SECONDS)
        finally:
            _end(process)
        text = log.read_text()
        _check(status == 0, f"status: got {status}, expected 0\n{text}")
        return text


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def archived_rows(out: Path, part: str, name: str, folder: Path) -> list[rows.Measurement]:
    """Return the rows of a CSV file in the archive of a part."""
    with tarfile.open(out / f"{part}.tar.gz") as archive:
        member = archive.extractfile(f"{part}/{name}")
        if member is None:
            return []
        file = folder / name
        file.write_bytes(io.BytesIO(member.read()).getvalue())
    return rows.read(file)


def _check_rows(found: list[rows.Measurement]) -> None:
    times = [row for row in found if row.median_ms is not None]
    _check(times, "the archive has no row with a time")
    for row in found:
        named = (row.device, row.torch, row.commit, row.when)
        _check(all(named), f"{row.provider}: got {named}, expected device, torch, commit, time")
        absent = row.note.startswith("absent")
        _check(row.median_ms is not None or absent, f"{row.provider}, {row.shape}: {row.note}")


def rehearse(folder: Path, whole: bool = False) -> None:
    """Run the rehearsal.

    Raises:
        RehearsalFailed: A check does not hold.
    """
    started = time.monotonic()
    plan.check()
    rehearsal = Rehearsal(folder)
    first = rehearsal.cut_off(folder / "first.log")
    budget = re.search(r"^total (\d+) s", first, re.MULTILINE)
    _check(budget and int(budget[1]) < plan.TOTAL_SECONDS, f"no budget in\n{first}")
    tests = re.search(r"^GPU tests: (\d+) collected", first, re.MULTILINE)
    _check(tests and int(tests[1]) > 0, f"no GPU tests in\n{first}")
    before = archived_rows(rehearsal.out, CUT_PART, CUT_FILE, folder)
    _check(before, "the archive of the cut part has no rows")
    shutil.rmtree(rehearsal.out)
    second = rehearsal.go_on(folder / "second.log")
    for step in ("versions", "tests"):
        _check(f"{step}: done" in second and ", before" in second, f"{step} ran again\n{second}")
    files = [path for path in rehearsal.out.rglob("*") if path.is_file()]
    _check(0 < len(files) <= plan.MOST_FILES, f"files: got {len(files)}")
    missing = {part.name for part in plan.PARTS} - {file.name.split(".")[0] for file in files}
    _check(not missing, f"no archive of {', '.join(missing)}")
    for part, name in (
        (CUT_PART, CUT_FILE),
        ("operators", "r_build.csv"),
        ("step", "training_step.csv"),
    ):
        _check_rows(rows.latest(archived_rows(rehearsal.out, part, name, folder)))
    if "tuning: done" in second:
        _check_rows(archived_rows(rehearsal.out, "tuning", "tuning.csv", folder))
    after = archived_rows(rehearsal.out, CUT_PART, CUT_FILE, folder)
    _check(after[: len(before)] == before, "rows measured before the cut are lost")
    for step in (step for part in plan.PARTS for step in part.steps):
        ended = re.search(rf"\b{step.name}: (done|absent)[^;\n]*", second)
        _check(ended, f"{step.name} has no end in\n{second}")
    size = sum(file.stat().st_size for file in files)
    print(second.rpartition("== tuning")[2].strip())
    print(
        f"rehearsal: {tests[1]} GPU tests, budgets {budget[1]} s, {len(files)} files of {size} "
        f"bytes, resumed after a cut, {time.monotonic() - started:.0f} s"
    )
    if whole:
        everywhere = run_tests.collect([], ["tests"], gpu=False)
        _check(everywhere == int(tests[1]), f"all test files hold {everywhere} GPU tests")
        print(f"all test files hold {everywhere} GPU tests, too")


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_pass.rehearsal")
    parser.add_argument("--folder", type=Path, help="of the files (default: a temporary one)")
    parser.add_argument("--whole", action="store_true", help="collect all test files, too")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            rehearse(folder, args.whole)
        except RehearsalFailed as error:
            print(f"the rehearsal failed: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
