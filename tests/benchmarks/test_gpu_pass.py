"""Tests of the GPU pass without a GPU: plan, limits, state, archives, tests in shares, rehearsal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import profiled, suites, tuning
from benchmarks.gpu_pass import __main__ as command
from benchmarks.gpu_pass import (
    cuda_library,
    machine_probe,
    plan,
    process,
    profile,
    run_tests,
    shards,
)
from benchmarks.gpu_pass.state import State
from benchmarks.protocol import RunSettings

ROOT = Path(__file__).resolve().parents[2]
GPU = RunSettings("cuda")


def test_the_plan_keeps_its_limits():
    plan.check()
    assert sum(part.seconds for part in plan.PARTS) < plan.TOTAL_SECONDS
    order = [part.name for part in plan.PARTS]
    assert order == [
        "build",
        "tests",
        "edits",
        "operators",
        "step",
        "profile",
        "sanitize",
        "tuning",
    ]
    assert list(plan.lines())[-1].startswith("total ")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((plan.Part("x", "", (plan.Step("x", plan.TOTAL_SECONDS, ()),)),), "less than 540 s"),
        ((plan.Part("x", "", ()),) * 9, "at most 8"),
    ],
)
def test_a_plan_that_breaks_a_limit(parts, message):
    with pytest.raises(ValueError, match=message):
        plan.check(parts)


@pytest.mark.parametrize(
    ("suite", "labels"),
    [
        ("edit_all_rows", plan.ALL_ROWS),
        ("edit_selected_rows", plan.SELECTED_ROWS),
        ("r_build", plan.R_BUILD),
        ("training_step", plan.TRAINING_STEP),
    ],
)
def test_the_planned_cases_exist(suite, labels):
    found = suites.specs(suite, RunSettings("cuda", labels=labels))
    assert [spec.label for spec in found] == list(labels)


def test_the_planned_cases_of_the_other_tools_exist():
    assert suites.specs("host_cost", RunSettings("cpu", match=(plan.HOST_COST,)))
    assert {label for group in plan.PROFILED for label in group} <= set(
        profiled.calls("cuda", False)
    )
    assert set(plan.TUNED) <= {spec.label for spec in tuning.specs(GPU)}


@pytest.mark.parametrize(("module", "heuristic", "mode"), tuning.EDIT_HEURISTICS)
def test_the_tuned_heuristics_exist(module, heuristic, mode):
    assert callable(getattr(tuning.kernel_module(module), heuristic))


def test_an_unknown_case():
    with pytest.raises(ValueError, match="labels: got 'nothing', expected cases of r_build: forw"):
        suites.specs("r_build", RunSettings("cuda", labels=("nothing",)))


def test_the_paths_of_the_tests_exist():
    assert all((ROOT / path).exists() for path in run_tests.paths())


HANG = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_hanging_command_and_its_children_are_stopped(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(process, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(process.stop, "__defaults__", (0.5,))
    started = time.monotonic()
    status = process.run([sys.executable, "-c", HANG], tmp_path / "log", 2.0, os.environ, tmp_path)
    assert status == process.STOPPED and time.monotonic() - started < 30
    child = int(capfd.readouterr().out.split()[1])
    for _ in range(50):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)
    assert (tmp_path / "log").read_text().startswith("child")


def test_a_command_that_prints_without_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "MOST_LOG_BYTES", 1 << 16)
    loop = "while True: print('x' * 1000)"
    status = process.run([sys.executable, "-c", loop], tmp_path / "log", 60.0, os.environ, tmp_path)
    assert status == process.STOPPED


def _pass(tmp_path, monkeypatch, steps, *arguments, machine=None):
    """Run a pass of one part and return its status."""
    monkeypatch.setattr(plan, "PARTS", (plan.Part("part", "about", steps),))
    found = machine or machine_probe.Machine("", {})
    monkeypatch.setattr(machine_probe, "probe", lambda: found)
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return command.main(
            ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state"), *arguments]
        )
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _python(name, code, seconds=20, needs=()):
    return plan.Step(name, seconds, ("{python}", "-c", code), needs)


def test_a_crash_ends_its_step_and_the_others_run(tmp_path, monkeypatch, capsys):
    steps = (
        _python("crash", "import os; os.abort()"),
        _python("missing", "print('never')", needs=("ncu",)),
        plan.Step("no_command", 20, ("{python}", "-m", "no_such_module"), ()),
        _python("fine", "print('well')"),
    )
    assert _pass(tmp_path, monkeypatch, steps) == 1
    output = capsys.readouterr().out
    assert "crash: failed with status -6" in output and "missing: absent (no ncu)" in output
    assert "no_command: failed with status 1" in output and "fine: done" in output
    with tarfile.open(tmp_path / "out" / "part.tar.gz") as archive:
        assert {"part/fine.log", "part/steps.json"} <= set(archive.getnames())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["part.tar.gz"]


def test_a_second_call_does_only_what_is_left(tmp_path, monkeypatch, capsys):
    count = "import sys, pathlib; p = pathlib.Path(r'{0}'); p.open('a').write('x'); {1}"
    first, second = tmp_path / "first", tmp_path / "second"
    fails = "sys.exit(4 if len(p.read_text()) == 1 else 0)"
    steps = (_python("one", count.format(first, "")), _python("two", count.format(second, fails)))
    assert _pass(tmp_path, monkeypatch, steps, "--seconds", "12") == 4
    (tmp_path / "out" / "part.tar.gz").unlink()
    assert _pass(tmp_path, monkeypatch, steps) == 0
    assert (first.read_text(), second.read_text()) == ("x", "xx")
    assert (tmp_path / "out" / "part.tar.gz").exists()
    assert "one: done in 0 s, before" in capsys.readouterr().out
    assert _pass(tmp_path, monkeypatch, steps) == 0  # the state is full: only archives
    assert (first.read_text(), second.read_text()) == ("x", "xx")
    assert _pass(tmp_path, monkeypatch, steps, "--fresh") == 0
    assert (first.read_text(), second.read_text()) == ("xx", "xxx")


def test_what_is_cut_off_goes_on_with_the_time_that_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(process, "GRACE_SECONDS", 1.0)
    file = tmp_path / "starts"
    code = f"p = __import__('pathlib').Path(r'{file}'); p.open('a').write('x'); "
    hangs = code + "len(p.read_text()) == 1 and __import__('time').sleep(600)"
    steps = (_python("first", "", 9), _python("hangs", hangs, 9), _python("last", "", 400))
    assert _pass(tmp_path, monkeypatch, steps) == 0
    output = capsys.readouterr().out
    assert "hangs: cut off after" in output and "== part: again" in output
    assert file.read_text() == "xx"
    assert output.index("last: done") < output.index("== part: again")


def test_a_step_whose_device_fails_goes_on_in_a_new_process(tmp_path, monkeypatch, capsys):
    file = tmp_path / "starts"
    code = f"p = __import__('pathlib').Path(r'{file}'); p.open('a').write('x'); "
    code += "raise SystemExit(3 if len(p.read_text()) < 3 else 0)"
    assert _pass(tmp_path, monkeypatch, (_python("breaks", code),)) == 0
    assert file.read_text() == "xxx"


def test_without_a_gpu_parts_that_need_one_are_absent(tmp_path, monkeypatch, capsys):
    assert _pass(tmp_path, monkeypatch, (_python("x", "", needs=("gpu",)),)) == 0
    assert "x: absent (no GPU)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "part: got 'everything', expected of build, tests"),
        (["--out", "/dev/null/out"], "--out: cannot write to /dev/null/out"),
        (["--out", "{0}", "--state", "{0}/state"], "expected a folder outside the output folder"),
        (["--out", "{0}/out", "--state", "/dev/null/state"], "--state: cannot write to /dev/null"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert command.main([argument.format(tmp_path) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_script_passes_arguments_on(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_pass.sh", "--plan"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": "/dev/null/out"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == list(plan.lines())


def test_the_state_of_other_sources_is_removed(tmp_path):
    state = State(tmp_path / "state", "old")
    state.set_step("edits", "one", "done")
    assert State(tmp_path / "state", "old").steps("edits") == {"one": "done"}
    assert State(tmp_path / "state", "new").steps("edits") == {}


def test_a_folder_with_other_files_is_not_removed(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="has files that no pass has written"):
        State(tmp_path, "sources", fresh=True)
    assert (tmp_path / "letter.txt").exists()


def test_damaged_records_of_a_state_count_as_nothing_done(tmp_path):
    state = State(tmp_path / "state", "sources")
    (state.part("edits") / "steps.json").write_text('{"one": "do')
    assert state.steps("edits") == {}


def test_an_archive_holds_the_end_of_long_logs_and_restores_the_state(tmp_path):
    state, out = State(tmp_path / "state", "sources"), tmp_path / "out"
    out.mkdir()
    folder = state.part("edits") / "tests"
    folder.mkdir()
    (folder / "0.log").write_bytes(os.urandom(1 << 20) + b"the end")
    (state.part("edits") / "rows.csv").write_text("a,b\n")
    archive = state.archive("edits", out)
    assert archive.stat().st_size < 300 << 10 and list(out.iterdir()) == [archive]
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "restored", filter="data")
    restored = tmp_path / "restored" / "edits"
    assert (restored / "rows.csv").read_text() == "a,b\n"
    assert (restored / "tests" / "0.log").read_bytes().endswith(b"the end")


def test_tools_are_found_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    machine = machine_probe.Machine("", {})
    assert machine_probe.tool("nvcc") is None
    assert machine.lacks("nvcc") == "no nvcc" and machine.lacks("gpu") == "no GPU"
    assert machine.lacks("no_such_package") == "the package no_such_package is not installed"
    assert machine.lacks("pytest") == ""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch(mode=0o755)
    assert machine_probe.tool("nvcc") == str(tmp_path / "bin" / "nvcc")


FAKE_NCU = """#!/usr/bin/env bash
# writes what ncu writes: a kernel if its option is among the arguments, else none
for word in "$@"; do
  [ "$previous" = --log-file ] && file=$word
  previous=$word
done
echo '==PROF== Connected to process 1' > "$file"
case " $* " in
  *" $FINDS "*) printf '"ID","Kernel Name"\\n"","","ns"\\n"0","edit_kernel"\\n' >> "$file" ;;
  *) echo '==WARNING== No kernels were profiled.' >> "$file" ;;
esac
"""


@pytest.mark.parametrize(
    ("finds", "status", "last"),
    [
        ("--nvtx-include", 0, "1 kernels profiled, limited by nvtx"),
        ("--profile-from-start", 0, "1 kernels profiled, limited by profiler-start"),
        ("--nothing", 1, "0 kernels profiled, limited by profiler-start"),
    ],
)
def test_a_profile_without_kernels_is_tried_in_another_way(
    finds, status, last, tmp_path, monkeypatch, capsys
):
    ncu = tmp_path / "ncu"
    ncu.write_text(FAKE_NCU)
    ncu.chmod(0o755)
    monkeypatch.setenv("FINDS", finds)
    arguments = ["--out", str(tmp_path), "--ncu", str(ncu), "--cases", "a b"]
    assert profile.main(arguments) == status
    output = capsys.readouterr().out
    assert last in output.splitlines()[-1]
    assert "--nvtx --nvtx-include profiled --metrics dram__bytes_read.sum," in output


@pytest.mark.parametrize(
    ("stamp", "loads", "used"),
    [("same", "", True), (None, "", True), ("other", "", False), ("same", "no symbol", False)],
)
def test_a_library_is_used_if_it_loads_and_fits_the_sources(
    stamp, loads, used, tmp_path, monkeypatch, capfd
):
    (tmp_path / "_native_cuda.so").touch()
    if stamp:
        text = cuda_library.digest() if stamp == "same" else stamp
        (tmp_path / "_native_cuda.sources").write_text(text)
    built = []

    def build(command, **_):
        built.append(command)
        monkeypatch.setattr(cuda_library, "loads", lambda: "")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cuda_library, "loads", lambda: loads)
    monkeypatch.setattr(cuda_library.subprocess, "run", build)
    assert cuda_library.main(["--arch", "90", "--out", str(tmp_path)]) == 0
    assert bool(built) != used
    if built:
        assert built[0][-2:] == ["--arch", "90"]
        assert (tmp_path / "_native_cuda.sources").read_text().strip() == cuda_library.digest()


def test_a_library_that_does_not_load_after_the_build_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cuda_library, "loads", lambda: "no symbol")
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(cuda_library.subprocess, "run", lambda *_, **__: done)
    assert cuda_library.main(["--out", str(tmp_path)]) == 1
    assert "does not load: no symbol" in capsys.readouterr().err


@pytest.mark.skipif(machine_probe.tool("nvcc") is None, reason="nvcc is not installed")
def test_the_build_can_be_for_one_architecture(tmp_path):
    command = [sys.executable, "csrc/build.py", "--cuda", "--arch", "90", "--dry-run"]
    command += ["--out", str(tmp_path), "--objects", str(tmp_path / "objects")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rules = (tmp_path / "objects" / "cuda" / "build.ninja").read_text()
    assert "code=sm_90" in rules and "sm_80" not in rules and "sm_100" not in rules
    assert "compile " in done.stdout and not list(tmp_path.rglob("*.o"))


SOME_TESTS = """
import os
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_kills_its_process(): os._exit(7)
@pytest.mark.skip(reason="needs nothing")
def test_skips(): pass
@pytest.mark.parametrize("k", range(6))
def test_more(k): pass
"""


@pytest.mark.slow
def test_shares_record_each_test_and_survive_a_crash(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    arguments = ["--results", str(tmp_path / "results"), "--workers", "2", "--markers", "not gpu"]
    arguments += ["--paths", str(tmp_path / "test_some.py")]
    assert run_tests.main([*arguments, "--", "-p", "no:randomly"]) == 1
    summary = capsys.readouterr().out
    assert "10 collected, 7 passed, 1 failed, 1 crashed, 1 skipped, 0 not run" in summary
    states = shards.results(tmp_path / "results")
    assert sorted(states.values()) == ["crashed", "failed", *["passed"] * 7, "skipped"]
    lines = [file.read_text() for file in (tmp_path / "results").glob("*.tsv")]
    assert run_tests.main(arguments) == 1  # everything has ended: no test runs again
    assert [file.read_text() for file in (tmp_path / "results").glob("*.tsv")] == lines


def test_no_test_at_all_is_an_error(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    arguments = ["--results", str(tmp_path / "results"), "--workers", "1"]
    assert run_tests.main([*arguments, "--paths", str(tmp_path / "test_some.py")]) == 1
    assert "no GPU test was collected" in capsys.readouterr().out


def test_tests_that_take_too_long_are_left_for_the_next_call(tmp_path, capsys):
    (tmp_path / "test_some.py").write_text("def test_hangs(): __import__('time').sleep(600)\n")
    arguments = ["--results", str(tmp_path / "results"), "--workers", "1", "--markers", "not gpu"]
    paths = ["--paths", str(tmp_path / "test_some.py")]
    assert run_tests.main([*arguments, "--seconds", "1", *paths]) == 4
    assert "not run" in capsys.readouterr().out


def test_kernels_come_first_and_compilation_last():
    names = [
        "tests/compile/test_compile.py::test_x[triton-cuda]",
        "tests/test_ops.py::test_x[torch-cuda]",
        "tests/test_ops.py::test_x[triton-cuda]",
        "tests/triton/test_edit_kernels.py::test_x",
    ]
    assert sorted(names, key=shards.rank) == names[::-1]


@pytest.mark.slow
def test_the_whole_pass_is_rehearsed_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_pass.rehearsal", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rehearsal: " in done.stdout and "8 files" in done.stdout
