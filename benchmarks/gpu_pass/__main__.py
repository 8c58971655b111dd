"""Run all tests and measurements that need a GPU, in under ten minutes. Nothing is installed.

    benchmarks/gpu_pass.sh [PART ...] [--plan] [--rehearse] [--fresh] [--out FOLDER]
        [--state FOLDER] [--seconds N] [--commit NAME]

Parts run in the order of their value, each within its budget; what a part leaves of its budget is
at the disposal of those that follow, and at the end of those that were cut off. After each part,
and every few seconds while it runs, its files are packed into one archive in the output folder
($OUT, by default build/gpu_pass_out). The state is kept in another folder ($STATE, by
default build/gpu_pass): a later call goes on where an earlier one ended, also with an empty output
folder, as long as the sources are the same. ``tar -xzf PART.tar.gz -C STATE`` restores a part.

--rehearse runs everything without a GPU on tiny inputs, with the same driver: the commands, their
options, the files and the limits are the same.

Exit status: 0 if all is well; 1 if a step failed; 2 for invalid arguments; 4 if something is left
for a later call; 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_pass import machine_probe, plan, process, summary
from benchmarks.gpu_pass.machine_probe import Machine
from benchmarks.gpu_pass.plan import Part, Step
from benchmarks.gpu_pass.state import State
from benchmarks.stopping import CUT_OFF, DEVICE_FAILED

ROOT = Path(__file__).resolve().parents[2]
ARCHIVE_SECONDS = 15  # between archives of a part that runs
LEAST_SECONDS = 8  # a step is not started with less
MOST_STARTS = 4  # of a step whose device fails
DONE, FAILED, CUT, ABSENT = "done", "failed", "cut off", "absent"
COMMIT_VARIABLE = "REFT_KERNELS_COMMIT"


class Pass:
    """One call of the pass."""

    def __init__(self, args: argparse.Namespace, machine: Machine, state: State) -> None:
        self.args, self.machine, self.state = args, machine, state
        self.parts = tuple(part for part in plan.PARTS if part.name in args.parts)
        self.deadline = time.monotonic() + args.seconds * args.stretch
        self._archived = 0.0

    def run(self) -> int:
        """Run the parts, then those that were cut off again while time is left."""
        planned_end = time.monotonic()
        for part in self.parts:
            planned_end += part.seconds * self.args.stretch
            self._part(part, planned_end)
        for part in self.parts:
            if self._left(part) and self.deadline - time.monotonic() > 2 * LEAST_SECONDS:
                print(f"== {part.name}: again, with the time that is left", flush=True)
                self._part(part, self.deadline, again=True)
        ends = {part.name: self.state.steps(part.name) for part in self.parts}
        print("\n".join(summary.lines(ends, self.state.folder)), flush=True)
        found = [end for steps in ends.values() for end in steps.values()]
        if any(end.startswith(FAILED) for end in found):
            return 1
        return CUT_OFF if any(end.startswith(CUT) for end in found) else 0

    def _ended(self, end: str) -> bool:
        return end.startswith(DONE) or end.startswith(FAILED) and not self.args.rehearse

    def _left(self, part: Part) -> bool:
        ends = self.state.steps(part.name)
        return any(ends.get(step.name, CUT).startswith(CUT) for step in part.steps)

    def _part(self, part: Part, planned_end: float, again: bool = False) -> None:
        print(f"== {part.name}: {part.about}, {part.seconds} s", flush=True)
        ends = self.state.steps(part.name)
        pending = [step for step in part.steps if not self._ended(ends.get(step.name, ""))]
        try:
            for step in part.steps:
                if step not in pending:
                    print(f"{step.name}: {ends[step.name]}, before", flush=True)
                    continue
                # later steps keep their budgets, earlier ones may have left some
                later = pending[pending.index(step) + 1 :]
                kept = 0 if again else sum(other.seconds for other in later) * self.args.stretch
                limit = min(planned_end - kept, self.deadline) - time.monotonic()
                try:
                    self._step(part, step, limit)
                except OSError as error:  # of the state folder: a full disk, for example
                    self._end(part, step, f"{FAILED}: {error}")
        finally:
            self._archive(part)

    def _step(self, part: Part, step: Step, limit: float) -> None:
        if self.args.rehearse and step.rehearsal == ():
            self._end(part, step, f"{DONE}: rehearsed by the step before")
            return
        needs = step.rehearsal_needs if self.args.rehearse else step.needs
        lacking = [reason for need in needs if (reason := self.machine.lacks(need))]
        if lacking:
            self._end(part, step, f"{ABSENT} ({', '.join(lacking)})")
            return
        if limit < LEAST_SECONDS:
            self._end(part, step, f"{CUT}: not started, {max(limit, 0):.0f} s were left")
            return
        folder = self.state.part(part.name)
        self._end(part, step, f"{CUT}: the pass ended while it ran", quiet=True)
        started = time.monotonic()
        print(f"-- {step.name}, at most {limit:.0f} s", flush=True)
        status = DEVICE_FAILED
        for _ in range(MOST_STARTS):
            left = started + limit - time.monotonic()
            if status != DEVICE_FAILED or left < LEAST_SECONDS:
                break
            # a step whose device failed goes on in a new process, without what broke the device
            status = process.run(
                self._command(step, folder, left - process.GRACE_SECONDS),
                folder / f"{step.name}.log",
                left - process.GRACE_SECONDS / 2,
                self._environment(step),
                ROOT,
                lambda: self._tick(part),
            )
        took = f"{time.monotonic() - started:.0f} s"
        if status == 0:
            self._end(part, step, f"{DONE} in {took}")
        elif status in (process.STOPPED, CUT_OFF):
            self._end(part, step, f"{CUT} after {took}")
        elif status == DEVICE_FAILED:
            self._end(part, step, f"{CUT} after {took}: the device failed")
        else:
            self._end(part, step, f"{FAILED} with status {status} after {took}")

    def _end(self, part: Part, step: Step, end: str, quiet: bool = False) -> None:
        try:
            self.state.set_step(part.name, step.name, end)
        except OSError as error:
            print(f"{step.name}: not recorded: {error}", flush=True)
        if not quiet:
            print(f"{step.name}: {end}", flush=True)

    def _tick(self, part: Part) -> None:
        if time.monotonic() - self._archived > ARCHIVE_SECONDS:
            self._archive(part)

    def _archive(self, part: Part) -> None:
        self._archived = time.monotonic()
        try:
            self.state.archive(part.name, self.args.out)
        except OSError as error:  # a full disk must not end the measurements
            print(f"{part.name}: no archive: {error}", flush=True)

    def _command(self, step: Step, folder: Path, seconds: float) -> list[str]:
        command = step.command
        if self.args.rehearse and step.rehearsal is not None:
            command = step.rehearsal
        values = {
            "python": sys.executable,
            "folder": str(folder),
            "seconds": f"{max(seconds, 1):.0f}",
            "arch": self.machine.arch,
            **self.machine.tools,
        }
        return [argument.format(**values) if "{" in argument else argument for argument in command]

    def _environment(self, step: Step) -> dict[str, str]:
        path = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(folder for folder in path if folder),
            "PYTHONUNBUFFERED": "1",
        }
        if self.args.commit:
            environment[COMMIT_VARIABLE] = self.args.commit
        if self.args.rehearse:
            environment |= dict(step.environment)
        return environment


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_pass.sh",
        description="Run all tests and measurements that need a GPU.",
        epilog="\n".join(plan.lines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in plan.PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--plan", action="store_true", help="print the plan and exit")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU, tiny inputs")
    parser.add_argument("--fresh", action="store_true", help="remove the state of earlier calls")
    parser.add_argument("--out", type=Path, help="folder of the archives (default: $OUT)")
    parser.add_argument("--state", type=Path, help="folder of the state (default: $STATE)")
    parser.add_argument("--seconds", type=float, default=plan.TOTAL_SECONDS, help="of the pass")
    parser.add_argument(
        "--stretch", type=float, default=1.0, help="factor of all budgets, for a slow machine"
    )
    parser.add_argument("--commit", help="name of the commit, for rows measured in a copy")
    return parser


def _writable(folder: Path, option: str) -> str:
    """Make a folder and return why it cannot be written, or an empty string."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{option}: cannot write to {folder}: {error.strerror}"


def _interrupt(number: int, _: object) -> None:
    raise process.Interrupted(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    args = _parser().parse_args(argv)
    names = [part.name for part in plan.PARTS]
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        print(f"part: got {unknown[0]!r}, expected of {', '.join(names)}", file=sys.stderr)
        return 2
    plan.check()
    print("\n".join(plan.lines()), flush=True)
    if args.plan:
        return 0
    kind = "rehearsal" if args.rehearse else "gpu_pass"
    default = ROOT / "build" / f"{kind}_out"
    args.out = (args.out or Path(os.environ.get("OUT") or default)).resolve()
    args.state = (args.state or Path(os.environ.get("STATE") or ROOT / "build" / kind)).resolve()
    args.parts = args.parts or names
    problem = _writable(args.out, "--out") or _writable(args.state.parent, "--state")
    if args.state == args.out or args.out in args.state.parents:
        problem = f"--state: got {args.state}, expected a folder outside the output folder"
    if problem:
        print(problem, file=sys.stderr)
        return 2
    try:
        machine = machine_probe.probe()
        from benchmarks import machine as sources  # imports torch, which the probe has tried

        digest = sources.sources_digest(("benchmarks", "csrc", "reft_kernels", "tests"))
        state = State(args.state, f"{digest} {kind}", args.fresh)
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if not machine.arch and not args.rehearse:
        print("no GPU: every part that needs one is left out; --rehearse runs without one")
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    started = time.monotonic()
    try:
        status = Pass(args, machine, state).run()
    except process.Interrupted as reason:
        print(f"ended by {reason}; the same command goes on from here", flush=True)
        status = 143
    print(f"archives: {args.out}, state: {args.state}, {time.monotonic() - started:.0f} s")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
