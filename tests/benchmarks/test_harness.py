"""Tests of the benchmark harness."""

from __future__ import annotations

import contextlib

import pytest
import torch

from benchmarks import edits, harness, op_metrics
from benchmarks.protocol import (
    AccuracyCheck,
    Call,
    Case,
    Provider,
    ProviderUnavailable,
    RunSettings,
)

ONCE = RunSettings(rounds=4)


def slow(log, name, sets=1):
    """Return a provider that logs its calls.

    A call takes longer than a sample, so that there is one per round.
    """
    import time

    def prepare(k):
        return Call(lambda _: (log.append((name, k)), time.sleep(1.1 * harness.SAMPLE_SECONDS)))

    return Provider(prepare)


def case(providers, baseline="one", **options):
    return Case("q", "forward", {"rows": 2, "d": 3}, torch.float32, providers, baseline, **options)


def by_name(rows):
    return {row.provider: row for row in rows}


def test_providers_take_turns_and_the_first_changes():
    log = []
    harness.measure(case({name: slow(log, name) for name in ("one", "two", "three")}), ONCE)
    # the last two calls of each provider count launches and memory
    measured = [name for name, _ in log][-2 * 3 - 3 * 4 : -2 * 3]
    rounds = [measured[k : k + 3] for k in range(0, 12, 3)]
    assert all(sorted(names) == ["one", "three", "two"] for names in rounds)
    assert [names[0] for names in rounds] == ["one", "two", "three", "one"]


def test_input_sets_rotate():
    log = []
    harness.measure(case({"one": slow(log, "one")}, sets=3), ONCE)
    taken = [k for _, k in log][-6:]
    assert all((b - a) % 3 == 1 for a, b in zip(taken, taken[1:], strict=False))


def test_a_wrong_provider_gets_its_error_and_no_time():
    log = []
    wrong = Provider(slow(log, "wrong").prepare, lambda: AccuracyCheck(0.5, 0.1))
    found = by_name(harness.measure(case({"one": slow([], "one"), "wrong": wrong}), ONCE))["wrong"]
    assert (
        found.median_ms is None
        and found.error == 0.5
        and found.note == "wrong: error 5.0e-01 against fp64, allowed 1.0e-01"
    )
    assert not log


def test_an_error_that_is_not_a_number_is_wrong():
    wrong = Provider(slow([], "wrong").prepare, lambda: AccuracyCheck(float("nan"), 0.1))
    assert by_name(harness.measure(case({"one": slow([], "one"), "wrong": wrong}), ONCE))[
        "wrong"
    ].note.startswith("wrong")


def test_the_row_of_a_provider_that_cannot_run_has_a_note():
    def missing(_):
        raise ProviderUnavailable("the package is not installed")

    def large(_):
        raise torch.OutOfMemoryError

    rows = harness.measure(
        case({"one": slow([], "one"), "missing": Provider(missing), "large": Provider(large)}), ONCE
    )
    assert {r.provider: r.note for r in rows} == {
        "one": "",
        "missing": "absent: the package is not installed",
        "large": "out of memory",
    }


@pytest.mark.parametrize("where", ["check", "prepare", "first call", "timed call"])
def test_an_error_ends_its_provider_and_not_the_case(where):
    calls = []

    def work(_):
        calls.append(where)
        if where == "first call" or where == "timed call" and len(calls) > 8:
            raise ZeroDivisionError("division of 1\nby 0")
        import time

        time.sleep(1.1 * harness.SAMPLE_SECONDS)

    def prepare(_):
        if where == "prepare":
            raise ZeroDivisionError("division of 1\nby 0")
        return Call(work)

    def check():
        if where == "check":
            raise ZeroDivisionError("division of 1\nby 0")
        return AccuracyCheck(0.0, 1.0)

    found = by_name(
        harness.measure(
            case({"broken": Provider(prepare, check), "one": slow([], "one")}, baseline="one"),
            RunSettings(rounds=9),
        )
    )
    assert found["broken"].note == "failed: ZeroDivisionError: division of 1"
    assert found["broken"].median_ms is None and found["broken"].ratio is None
    assert found["one"].rounds == 9 and found["one"].ratio == 1.0 and found["one"].note == ""


def test_an_unknown_baseline():
    with pytest.raises(KeyError):
        harness.measure(case({"one": slow([], "one")}, baseline="two"), ONCE)


def test_a_baseline_that_cannot_run_leaves_no_ratio():
    def missing(_):
        raise ProviderUnavailable("gone")

    found = by_name(harness.measure(case({"one": Provider(missing), "two": slow([], "two")}), ONCE))
    assert found["two"].ratio is None and found["two"].median_ms > 0


def test_numbers_of_a_row():
    tensor = torch.zeros(1 << 20)
    half = Provider(lambda _: Call(lambda _: tensor[: 1 << 19].clone()))
    rows = by_name(
        harness.measure(case({"one": half}, clone=[tensor], bytes=4 << 20), RunSettings(rounds=7))
    )
    clone, own = rows[harness.CLONE], rows["one"]
    assert clone.bytes == 8 << 20 and clone.clone_fraction == 1.0 and own.ratio == 1.0
    assert own.p20_ms <= own.median_ms <= own.p80_ms
    assert (own.launches, own.peak_bytes, clone.peak_bytes) == (1, 2 << 20, 4 << 20)
    assert (
        own.device
        and own.torch == torch.__version__
        and own.rounds == 7
        and own.shape == "rows=2 d=3"
    )


def test_before_is_not_timed_and_its_result_is_handed_on():
    import time

    def before():
        time.sleep(0.05)
        return "made"

    seen = []
    rows = harness.measure(case({"one": Provider(lambda _: Call(seen.append, before))}), ONCE)
    assert set(seen) == {"made"} and rows[0].median_ms < 25


def test_the_context_holds_during_every_call():
    inside = []

    @contextlib.contextmanager
    def context():
        inside.append(True)
        yield
        inside.pop()

    states = []
    harness.measure(
        case(
            {
                "one": Provider(
                    lambda _: Call(lambda _: states.append(bool(inside)), context=context)
                )
            }
        ),
        ONCE,
    )
    assert states and all(states) and not inside


def test_samples_of_other_processes():
    rows = by_name(
        harness.rows_of_samples(
            case({}), ONCE, {"one": [1.0, 2.0, 3.0], "two": [2.0, 2.0, 9.0]}, {"three": "failed"}
        )
    )
    assert rows["two"].ratio == 2.0 and rows["two"].median_ms == 2000.0 and rows["two"].rounds == 3
    assert rows["three"].note == "failed" and rows["three"].median_ms is None


def test_operators_are_counted_without_views_and_allocations():
    x = torch.randn(4, 6)

    def work(_):
        y = x.t().reshape(24).view(6, 4)  # reshape copies
        torch.empty(3)
        return y @ x

    assert op_metrics.launches(Call(work), "cpu") == 2


def test_peak_memory_counts_what_is_freed_too():
    def work(_):
        large = torch.ones(1 << 20)
        small = large[:4].clone()  # 16 bytes
        del large
        return small

    assert op_metrics.peak_bytes(Call(work), "cpu") == (4 << 20) + 16


def test_the_accuracy_check_of_edits_detects_errors():
    problem = edits.draw(12, 16, 3, torch.float32, "cpu", 1)[0]
    gate = edits.EditGate(problem, backward=True)
    right = gate(edits.eager_folded)
    assert right.error <= right.allowed
    for wrong in (
        lambda h, R, W, b: h * 1,
        lambda h, R, W, b: edits.eager_unfolded(h, R, W, b * 1.001),
        lambda h, R, W, b: edits.eager_unfolded(h, R.detach(), W, b) + 0 * R.sum(),
    ):
        verdict = gate(wrong)
        assert verdict.error > verdict.allowed


def test_a_forced_backend_serves_forward_and_backward(monkeypatch):
    from reft_kernels import reference

    seen = []
    for name in ("edit", "edit_backward"):
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *a, f=function, n=name: seen.append(n) or f(*a))
    import reft_kernels

    problems = edits.draw(6, 8, 2, torch.float32, "cpu", 1)
    edits.provider(reft_kernels.loreft, problems, "both", None, "torch").prepare(0).once()
    assert seen == ["edit", "edit_backward"]
