"""A comparison: equal budgets, choice on held-out rows alone, runs in turn, nothing done twice,
nothing dropped.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from reft_train.errors import UserError

from tests.reft_train.compare.plans import METHODS, FakeFinal, plan, run
from tests.reft_train.fake_training import FakeTrain, quality


def refuse(method: str, error: Exception):
    """A training's ``before`` that fails for one method."""

    def before(config, call):
        if config.method == method:
            raise error

    return before


def test_every_method_gets_the_same_number_of_trials(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "c"), train)
    assert Counter(config.method for config in train.seen) == dict.fromkeys(METHODS, 2)


def test_a_failed_trial_counts_in_the_budget(tmp_path):
    def before(config, call):
        if call == 1:
            raise RuntimeError("out of memory")

    train = FakeTrain(before=before)
    run(plan(tmp_path / "c"), train)
    assert Counter(config.method for config in train.seen) == dict.fromkeys(METHODS, 2)


def test_every_method_tries_the_same_points_of_the_same_space(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "c"), train)
    tried = {
        method: [config.lr for config in train.seen if config.method == method]
        for method in METHODS
    }
    assert tried["loreft"] == tried["lora"] == tried["ia3"]


def test_tuning_never_scores_a_test_set_and_the_final_runs_do(tmp_path):
    train, final = FakeTrain(), FakeFinal()
    run(plan(tmp_path / "c"), train, final)
    assert all(config.skip_test for config in train.seen) and not any(
        config.skip_test for config in final.seen
    )


def test_the_final_runs_have_the_best_held_out_settings(tmp_path):
    train, final = FakeTrain(), FakeFinal()
    run(plan(tmp_path / "c", trials=3), train, final)
    for method in METHODS:
        best = max((config for config in train.seen if config.method == method), key=quality)
        assert {config.lr for config in final.seen if config.method == method} == {best.lr}


def test_runs_alternate_between_methods_and_another_one_begins_each_seed(tmp_path):
    final = FakeFinal()
    run(plan(tmp_path / "c"), None, final)
    assert [(config.method, config.seed) for config in final.seen] == [
        ("loreft", 42),
        ("lora", 42),
        ("ia3", 42),
        ("lora", 43),
        ("ia3", 43),
        ("loreft", 43),
    ]


def test_a_row_has_mean_and_deviation_over_seeds(tmp_path):
    found = run(plan(tmp_path / "c"))
    first, second = (found.outcomes["lora", seed].tests["test"]["accuracy"] for seed in (42, 43))
    row = found.summary.loc[1]
    assert row.test_mean == pytest.approx(
        (first + second) / 2, rel=1e-12
    )  # one rounding of a mean of two
    assert row.test_deviation == pytest.approx(abs(first - second) / 2**0.5, rel=1e-9)


def test_one_seed_has_no_deviation(tmp_path):
    row = run(plan(tmp_path / "c", seeds=(42,))).summary.loc[0]
    assert math.isnan(row.test_deviation) and row.test_mean == row.test_test_mean


def test_a_finished_comparison_trains_nothing_more(tmp_path):
    first = run(plan(tmp_path / "c"))
    train, final = FakeTrain(), FakeFinal()
    assert run(plan(tmp_path / "c"), train, final).rows == first.rows
    assert train.seen == final.seen == []


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "c"), None, FakeFinal(interrupted=2))
    final = FakeFinal()
    run(plan(tmp_path / "c"), None, final)
    assert [(config.method, config.seed) for config in final.seen] == [
        ("ia3", 42),
        ("lora", 43),
        ("ia3", 43),
        ("loreft", 43),
    ]


def test_an_interrupted_search_ends_the_comparison(tmp_path):
    def before(config, call):
        if call == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "c"), FakeTrain(before=before))


def test_another_seed_runs_what_is_missing(tmp_path):
    run(plan(tmp_path / "c"))
    final = FakeFinal()
    run(plan(tmp_path / "c", seeds=(42, 43, 44)), None, final)
    assert [config.seed for config in final.seen] == [44, 44, 44]


def test_a_run_with_other_settings_is_run_again(tmp_path):
    run(plan(tmp_path / "c", trials=1))
    final = FakeFinal()
    found = run(plan(tmp_path / "c", trials=4), None, final)
    changed = {
        row["method"]
        for row in found.rows
        if found.outcomes[row["method"], 42].config["lr"] == row["varied"]["lr"]
    }
    assert changed == set(METHODS) and len(final.seen) == 6


def test_a_method_that_the_model_refuses_is_shown_as_not_available(tmp_path):
    found = run(
        plan(tmp_path / "c"),
        FakeTrain(before=refuse("lora", UserError("method lora: no such modules"))),
    )
    assert [row["status"] for row in found.rows] == [
        "ok",
        "not available: method lora: no such modules",
        "ok",
    ]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes"), TypeError("shapes"), AttributeError("shapes"), KeyError("shapes")],
)
def test_a_method_that_breaks_is_shown_as_failed(tmp_path, error):
    found = run(plan(tmp_path / "c"), FakeTrain(before=refuse("lora", error)))
    assert (
        found.rows[1]["status"] == f"failed: {type(error).__name__}: {error}"
        and found.rows[2]["status"] == "ok"
    )


def test_bad_input_that_every_method_refuses_is_bad_input(tmp_path):
    def before(config, call):
        raise UserError("train: got none")

    with pytest.raises(UserError, match="train: got none"):
        run(plan(tmp_path / "c"), FakeTrain(before=before))


def test_a_seed_that_fails_is_counted(tmp_path):
    found = run(plan(tmp_path / "c"), None, FakeFinal(failing=(("lora", 43),)))
    assert found.rows[1]["status"] == "1 of 2 seeds failed: RuntimeError: out of memory"
    assert found.rows[1]["seeds"] == 1


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match="contains other files"):
        run(plan(tmp_path))
