"""The harness on a GPU, with stand-ins for CUDA's streams, events and graphs on the CPU.

A graph's stand-in records what is called while it is captured. Calls run for real, on CPU tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal

import pytest
import torch

import reft_kernels
from benchmarks import edits, graphs, harness, machine, op_metrics, rows, run, stopping, suites
from benchmarks.protocol import Call, Case, Provider, RunSettings


class Cuda:
    """State of the stand-ins."""

    def __init__(self):
        self.capturing = False
        self.captured = []  # of each graph, the names of the calls
        self.failed = False
        self.clock = 0.0


class Graph:
    def __init__(self, cuda):
        self.cuda, self.calls = cuda, []

    def replay(self):
        if self.cuda.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.cuda.clock += len(self.calls) * 2.0  # two milliseconds each


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = self.cuda.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at + 1e-3


@pytest.fixture
def cuda(monkeypatch):
    state = Cuda()

    @contextlib.contextmanager
    def capture(graph, stream=None):
        state.capturing, state.calls = True, graph.calls
        try:
            yield
        finally:
            state.capturing = False
        state.captured.append(graph.calls)

    def synchronize():
        if state.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        if state.failed:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in {
        "CUDAGraph": lambda: Graph(state),
        "graph": capture,
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": synchronize,
        "Event": lambda enable_timing: Event(state),
        "empty_cache": lambda: None,
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(harness, "SETTLE_SECONDS", {"cuda": 0.0, "cpu": 0.0})
    monkeypatch.setattr(machine, "device_name", lambda device: "stand-in")
    monkeypatch.setattr(machine, "driver", lambda device: "0")
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 1 << 40)
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 60 << 20)
    monkeypatch.setattr(op_metrics, "launches", lambda call, device: 1)
    monkeypatch.setattr(op_metrics, "peak_bytes", lambda call, device: 0)
    stopping.reset()
    yield state
    stopping.reset()


def recorded(cuda, name, work=lambda k: None, before=None, **options):
    """Return a provider whose calls write their name into the graph that captures them."""

    def prepare(k):
        def run(prepared):
            if cuda.capturing:
                cuda.calls.append((name, k))
            return work(k) if before is None else work(prepared)

        return Call(run, before or (lambda: None), **options)

    return Provider(prepare)


def measure(providers, sets=1, **options):
    case = Case("q", "forward", {"rows": 2}, torch.float32, providers, "one", sets=sets, **options)
    return {row.provider: row for row in harness.measure(case, RunSettings("cuda", rounds=4))}


@pytest.mark.parametrize(("sets", "count"), [(1, 32), (3, 33), (32, 32), (66, 66)])
def test_a_graph_holds_whole_rotations_of_at_least_32_calls(cuda, sets, count):
    found = measure({"one": recorded(cuda, "one")}, sets)["one"]
    assert cuda.captured == [[("one", k % sets) for k in range(count)]]
    assert found.graph_ms == pytest.approx(2.0, rel=1e-3)  # of one call
    assert found.note == "" and found.rounds == 4


def test_results_of_a_rotation_are_kept_apart(cuda):
    alive = []

    def work(k):
        made = torch.empty(4)
        alive.append(made.data_ptr())
        return made

    tensors = [torch.zeros(4) for _ in range(8)]
    case = Case(
        "q",
        "forward",
        {},
        torch.float32,
        {"one": recorded(cuda, "one", work)},
        "one",
        sets=8,
        clone=tensors,
    )
    harness.measure(case, RunSettings("cuda", rounds=2))
    rotation = alive[-40:-32] if len(alive) > 40 else alive[-8:]
    assert len(set(rotation)) == 8


def test_a_backward_is_captured_without_its_forward(cuda):
    forwards = []

    def edit(h, R, W, b):
        forwards.append(cuda.capturing)
        return reft_kernels.loreft(h, R, W, b)

    problems = edits.draw(6, 16, 2, torch.float32, "cpu", 2)
    gate = edits.EditGate(problems[0], backward=True)
    provider = edits.provider(edit, problems, "backward", gate)
    found = measure({"one": provider}, 2)["one"]
    assert found.graph_ms is not None and found.note == "", found.note
    assert len(cuda.captured) == 1 and not any(forwards)


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_repeated_calls_compute_the_same(mode):
    problem = edits.draw(6, 16, 2, torch.float32, "cpu", 1)
    call = edits.provider(edits.eager_unfolded, problem, mode, None).prepare(0)
    prepared = call.before()
    first, second = call.repeat(prepared), call.repeat(prepared)
    once = call.once()
    for results in (second, once):
        for a, b in zip(first, results, strict=True):
            assert torch.equal(a, b)


def test_a_call_that_cannot_be_captured_keeps_its_other_times(cuda):
    found = measure(
        {
            "one": recorded(cuda, "one"),
            "syncs": recorded(cuda, "syncs", lambda k: torch.cuda.synchronize()),
            "not capturable": recorded(cuda, "no", capturable=False),
        }
    )
    assert found["syncs"].note == (
        "no graph: RuntimeError: operation not permitted when stream is capturing"
    )
    assert found["syncs"].graph_ms is None and found["syncs"].median_ms is not None
    assert found["not capturable"].graph_ms is None and found["not capturable"].note == ""
    assert found["one"].graph_ms is not None


def test_a_share_of_clone_compares_like_with_like(cuda):
    tensors = [torch.zeros(1024)]
    found = measure(
        {"one": recorded(cuda, "one", capturable=False)}, clone=tensors, bytes=2 * tensors[0].nbytes
    )
    assert found[harness.CLONE].graph_ms is not None
    assert found["one"].clone_fraction is not None  # of the times with the host


def test_a_failed_device_ends_the_run_with_the_rows_until_then(cuda):
    def breaks(k):
        cuda.failed = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = measure(
        {
            "one": recorded(cuda, "one"),
            "bad": recorded(cuda, "bad", breaks),
            "last": recorded(cuda, "last"),
        }
    )
    assert found["bad"].note.startswith("failed: RuntimeError: CUDA error")
    assert found["last"].note.startswith("not measured: the device failed")
    assert stopping.status() == stopping.DEVICE_FAILED and not stopping.device_works()


def test_sets_count_all_bytes_and_fit_the_memory(cuda, monkeypatch):
    assert harness.sets_for(134 << 20, "cuda") == 2
    assert harness.sets_for(3 << 20, "cuda") == 80
    assert harness.sets_for(1 << 10, "cuda") == harness.MOST_SETS["cuda"]
    assert harness.sets_for(1 << 30, "cuda") == 1
    monkeypatch.setattr(machine, "memory_bytes", lambda device: 1 << 30)
    assert harness.sets_for(3 << 20, "cuda", held=64 << 20) == 4


def case_of(name, work, rounds=1000):
    return Case(
        "q",
        "forward",
        {"rows": 1},
        torch.float32,
        {name: Provider(lambda k: Call(lambda _: work()))},
        name,
        rounds=rounds,
    )


def test_sigterm_ends_a_case_after_the_round_at_hand():
    calls = []

    def work():
        calls.append(1)
        if len(calls) == 40:
            signal.raise_signal(signal.SIGTERM)
        import time

        time.sleep(1.1 * harness.SAMPLE_SECONDS)

    former = signal.getsignal(signal.SIGTERM)
    try:
        stopping.install()
        (row,) = harness.measure(case_of("one", work), RunSettings())
        assert row.median_ms is not None and 30 < row.rounds < 41
        assert stopping.requested() == "SIGTERM" and stopping.status() == stopping.CUT_OFF
    finally:
        signal.signal(signal.SIGTERM, former)
        stopping.reset()


def test_a_time_limit_leaves_providers_out_that_are_not_ready():
    former = signal.getsignal(signal.SIGTERM)
    try:
        stopping.install(seconds=1e-9)
        (row,) = harness.measure(case_of("one", lambda: None), RunSettings())
        assert row.median_ms is None and row.note == "not measured: the time limit was reached"
    finally:
        signal.signal(signal.SIGTERM, former)
        stopping.reset()


@pytest.fixture
def _signals():
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)
    stopping.reset()


@pytest.mark.usefixtures("_signals")
def test_a_resumed_run_leaves_out_what_is_measured(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    arguments = ["--only", "host_cost", "--device", "cpu", "--rounds", "1", "--csv", str(file)]
    arguments += ["--cases", "both function=red float32", "forward function=red float32"]
    assert run.main(arguments) == 0
    text = file.read_text()
    assert sorted(row.mode for row in rows.read(file)) == ["both"] * 2 + ["forward"] * 2
    assert run.main([*arguments, "--resume"]) == 0 and file.read_text() == text
    assert f"host_cost: every case is in {file}" in capsys.readouterr().out


@pytest.mark.usefixtures("_signals")
def test_a_resumed_run_repeats_what_was_cut_off_without_what_failed(tmp_path):
    file = tmp_path / "rows.csv"
    arguments = ["--only", "host_cost", "--device", "cpu", "--rounds", "1", "--csv", str(file)]
    arguments += ["--cases", "both function=loreft float32"]
    assert run.main(arguments) == 0
    own, reference, eager = rows.read(file)
    no_time = {"median_ms": None, "p20_ms": None, "p80_ms": None}
    file.unlink()
    rows.append(
        [
            own,
            dataclasses.replace(reference, note="not measured: the device failed", **no_time),
            dataclasses.replace(eager, note="failed: RuntimeError", **no_time),
        ],
        file,
    )
    assert run.main([*arguments, "--resume"]) == 0
    again = rows.read(file)[3:]
    assert [row.provider for row in again] == ["reft_kernels", "reft_kernels, torch backend"]


def test_a_case_that_cannot_be_built_yields_a_row_with_the_reason():
    from benchmarks.protocol import CaseSpec

    def build():
        raise torch.OutOfMemoryError

    spec = CaseSpec("forward", {"rows": 1}, torch.float32, build)
    (row,) = harness.measure_spec("edit_all_rows", spec, RunSettings())
    assert (row.suite, row.mode, row.shape, row.note) == (
        "edit_all_rows",
        "forward",
        "rows=1",
        "out of memory",
    )


@pytest.mark.usefixtures("_signals")
def test_a_suite_that_raises_does_not_end_the_others(monkeypatch, capsys):
    measured = []

    def measure(name, settings):
        measured.append(name)
        if name == "r_build":
            raise ZeroDivisionError
        yield from ()

    monkeypatch.setattr(suites, "measure", measure)
    assert run.main(["--only", "r_build", "host_cost", "--device", "cpu"]) == 1
    assert measured == ["r_build", "host_cost"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_graphs_need_no_more_calls_than_sets():
    assert [graphs.calls_of(sets) for sets in (1, 2, 5, 32, 33, 256)] == [32, 32, 35, 32, 33, 256]
