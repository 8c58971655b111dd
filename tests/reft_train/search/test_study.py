"""A search: its trials, its choice, its files, and what ends it early."""

from __future__ import annotations

import pandas
import pytest
from optuna.distributions import FloatDistribution
from reft_train.config import build, read_yaml
from reft_train.errors import UserError
from reft_train.search.space import choices
from reft_train.search.study import Objective, search, settings_of, state_of

from tests.reft_train.fake_training import FakeTrain, finished, quality
from tests.reft_train.search.plans import SPACE, plan, silent


def states(found) -> list[str]:
    return [state_of(trial) for trial in found.trials]


def run(plan, train):
    return search(plan, train, silent)


def stop_at(number: int, error: type[BaseException], *arguments: str):
    """A training's ``before`` that raises in the call of that number."""

    def before(config, call):
        if call == number:
            raise error(*arguments)

    return before


def test_the_best_trial_is_the_one_with_the_best_held_out_value(tmp_path):
    train = FakeTrain()
    found = run(plan(tmp_path / "s"), train)
    assert found.best.value == max(map(quality, train.seen))


def test_a_loss_is_minimized(tmp_path):
    train = FakeTrain()
    found = run(plan(tmp_path / "s", objective=Objective("loss")), train)
    assert found.best.value == 1 - max(map(quality, train.seen))


def test_the_first_trial_has_the_settings_own_values(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "s", {"lr": 3e-4, "rank": 2}), train)
    assert (train.seen[0].lr, train.seen[0].rank) == (3e-4, 2)


def test_a_value_outside_the_space_does_not_start_it(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "s", {"lr": 0.5, "rank": 3}), train)
    assert train.seen[0].rank in (1, 2, 4, 8) and train.seen[0].lr <= 1e-1


def test_no_trial_scores_a_test_set(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "s"), train)
    assert [config.skip_test for config in train.seen] == [True] * 4


def test_the_best_settings_make_a_run_that_is_tested(tmp_path):
    train = FakeTrain()
    found = run(plan(tmp_path / "s"), train)
    again = build(read_yaml(tmp_path / "s" / "best.yaml"))
    assert again == found.best_config
    assert (again.lr, again.rank, again.skip_test) == (
        settings_of(found.best)["lr"],
        settings_of(found.best)["rank"],
        False,
    )


def test_layers_come_back_from_the_best_settings_as_numbers(tmp_path):
    found = run(plan(tmp_path / "s", space={"layers": choices(([0, 2], [1, 3]))}), FakeTrain())
    assert (
        build(read_yaml(tmp_path / "s" / "best.yaml")).layers
        == settings_of(found.best)["layers"]
        in ([0, 2], [1, 3])
    )


def test_only_the_best_trial_keeps_weights_and_checkpoints(tmp_path):
    found = run(plan(tmp_path / "s"), FakeTrain())
    kept = {path.parent.name for path in (tmp_path / "s" / "trials").glob("*/adapter")}
    checkpoints = {path.parent.name for path in (tmp_path / "s" / "trials").glob("*/checkpoint-*")}
    assert kept == checkpoints == {str(found.best.number)}


def test_an_interrupted_search_goes_on_to_what_an_uninterrupted_one_finds(tmp_path):
    whole, parts = FakeTrain(), FakeTrain(before=stop_at(2, KeyboardInterrupt))
    run(plan(tmp_path / "whole", trials=5), whole)
    first = run(plan(tmp_path / "parts", trials=5), parts)
    second = run(plan(tmp_path / "parts", trials=5), parts)
    assert first.interrupted and not second.interrupted
    tried = [(config.lr, config.rank) for config in parts.seen]
    assert tried[:2] + tried[3:] == [(config.lr, config.rank) for config in whole.seen]


def test_the_interrupted_trial_is_taken_up_again_under_a_new_number(tmp_path):
    train = FakeTrain(before=stop_at(2, KeyboardInterrupt))
    run(plan(tmp_path / "s"), train)
    found = run(plan(tmp_path / "s"), train)
    assert states(found) == ["complete", "complete", "interrupted", "complete", "complete"]
    assert found.study.trials[3].user_attrs["retry_of"] == 2
    assert found.trials[3].params == found.trials[2].params


def test_a_killed_trial_is_taken_up_again(tmp_path):
    class Killed(BaseException):
        pass

    train = FakeTrain(before=stop_at(2, Killed))
    with pytest.raises(Killed):
        run(plan(tmp_path / "s"), train)
    found = run(plan(tmp_path / "s"), train)
    assert states(found) == ["complete", "complete", "interrupted", "complete", "complete"]


def test_a_training_that_ends_at_an_interruption_ends_the_search(tmp_path):
    def train(config, **options):
        return finished(config, interrupted=True)

    found = run(plan(tmp_path / "s"), train)
    assert found.interrupted and states(found) == ["interrupted"]


def test_a_finished_search_trains_nothing_more(tmp_path):
    train = FakeTrain()
    first, second = run(plan(tmp_path / "s"), train), run(plan(tmp_path / "s"), train)
    assert len(train.seen) == 4 and first.trials == second.trials


def test_more_trials_go_on_from_those_there_are(tmp_path):
    train = FakeTrain()
    run(plan(tmp_path / "s", trials=2), train)
    assert [trial.number for trial in run(plan(tmp_path / "s", trials=3), train).trials] == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), FloatingPointError("the loss is nan"), MemoryError("no")],
)
def test_a_failed_trial_is_recorded_and_the_search_goes_on(tmp_path, error):
    def before(config, call):
        if call == 1:
            raise error

    found = run(plan(tmp_path / "s"), FakeTrain(before=before))
    assert states(found) == ["complete", "failed", "complete", "complete"]
    assert found.trials[1].user_attrs["reason"] == f"{type(error).__name__}: {error}"


def test_a_held_out_value_that_is_no_number_fails_the_trial(tmp_path):
    values = iter([0.5, float("nan"), 0.6, 0.7])
    found = run(plan(tmp_path / "s"), FakeTrain(quality=lambda config: next(values), evaluations=1))
    assert found.trials[1].user_attrs["reason"] == "FloatingPointError: held-out accuracy is nan"


def test_bad_input_in_the_first_trial_stops_the_search(tmp_path):
    with pytest.raises(UserError, match="model: got none"):
        run(plan(tmp_path / "s"), FakeTrain(before=stop_at(0, UserError, "model: got none")))


def test_bad_input_that_is_mended_does_not_count(tmp_path):
    with pytest.raises(UserError):
        run(plan(tmp_path / "s"), FakeTrain(before=stop_at(0, UserError, "model: got none")))
    found = run(plan(tmp_path / "s", {"model": "another"}), FakeTrain())
    assert states(found) == ["complete"] * 4


def test_bad_input_in_a_later_trial_is_that_trials_failure(tmp_path):
    found = run(plan(tmp_path / "s"), FakeTrain(before=stop_at(2, UserError, "layers: got 9")))
    assert (
        state_of(found.trials[2]) == "failed"
        and found.trials[2].user_attrs["reason"] == "layers: got 9"
    )


def test_a_hopeless_trial_is_pruned_before_its_end(tmp_path):
    values = iter([0.9, 0.8, 0.9, 0.8, 0.9, 0.1])
    train = FakeTrain(quality=lambda config: next(values))
    found = run(plan(tmp_path / "s", trials=6, prune=True), train)
    assert states(found) == ["complete"] * 5 + ["pruned"]
    assert train.steps == 5 * 3 + 1 and found.trials[5].intermediate_values == {1: 0.1 * (1 / 3)}


def test_a_trial_is_not_pruned_at_its_end(tmp_path):
    values = iter([0.9, 0.8, 0.9, 0.8, 0.9, 0.1])
    train = FakeTrain(quality=lambda config: next(values), evaluations=1)
    found = run(plan(tmp_path / "s", trials=6, prune=True), train)
    assert states(found) == ["complete"] * 6


def test_a_search_with_other_settings_is_refused(tmp_path):
    run(plan(tmp_path / "s"), FakeTrain())
    with pytest.raises(UserError, match="which contains a search with other settings"):
        run(plan(tmp_path / "s", {"epochs": 2}), FakeTrain())


def test_a_search_in_another_space_is_refused(tmp_path):
    run(plan(tmp_path / "s"), FakeTrain())
    with pytest.raises(UserError, match="which contains a search with other settings"):
        run(plan(tmp_path / "s", space={"lr": FloatDistribution(1e-4, 1e-3)}), FakeTrain())


def test_overwriting_starts_anew(tmp_path):
    run(plan(tmp_path / "s"), FakeTrain())
    found = run(plan(tmp_path / "s", {"epochs": 2, "overwrite": True}, trials=2), FakeTrain())
    assert [trial.number for trial in found.trials] == [0, 1]
    assert found.best_config.overwrite is False


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="contains other files"):
        run(plan(tmp_path), FakeTrain())


def test_another_sampler_seed_tries_other_values(tmp_path):
    trains = [FakeTrain(), FakeTrain()]
    for seed, train in enumerate(trains):
        run(plan(tmp_path / str(seed), sampler_seed=seed, start=False, trials=1), train)
    assert trains[0].seen[0].lr != trains[1].seen[0].lr


def test_the_trials_are_written_as_a_table(tmp_path):
    found = run(plan(tmp_path / "s"), FakeTrain())
    table = pandas.read_csv(tmp_path / "s" / "trials.csv")
    assert table.value.tolist() == pytest.approx(
        sorted((t.value for t in found.trials), reverse=True)
    )
    assert {f"params_{name}" for name in SPACE} <= set(table.columns)
