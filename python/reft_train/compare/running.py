"""The comparison itself: every method's search under the same budget, then the tested runs in
turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reft_train import tasks
from reft_train.compare.collect import Row, Tuned, finished, row
from reft_train.compare.isolated import RunFailed, run_isolated
from reft_train.compare.plan import Plan
from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.search.space import Space
from reft_train.search.storing import open_study, trials
from reft_train.search.study import Plan as SearchPlan
from reft_train.search.study import Search, Train, search
from reft_train.training.outcome import Outcome


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the plan's methods; ``outcomes`` by (method, seed)."""

    plan: Plan
    rows: list[Row]
    outcomes: Mapping[tuple[str, int], Outcome]


def compare(
    plan: Plan,
    spaces: Mapping[str, Space],
    train: Train,
    final: Callable[[RunConfig], Outcome] = run_isolated,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Tune every method on held-out rows, then train and test its best settings with each seed.

    What was done before, with the same settings, is not done again.

    Args:
        spaces: what each method's search varies. train: of the searches, in this process. final: of
            the tested runs.

    Raises:
        UserError: what every method refuses, or a folder with another comparison.
            KeyboardInterrupt: Ctrl-C.
    """
    _check_folder(plan)
    tuned = {method: _tuned(plan, method, spaces[method], train, say) for method in plan.methods}
    refused = [result.reason for result in tuned.values() if not result.available]
    if len(refused) == len(tuned):
        raise UserError(refused[0])
    outcomes: dict[tuple[str, int], Outcome] = {}
    failures: dict[str, list[str]] = {method: [] for method in plan.methods}
    for method, seed in plan.order(
        [method for method in plan.methods if tuned[method].best is not None]
    ):
        config = plan.final_config(tuned[method].best, seed)
        outcome = finished(config)
        if outcome is None:
            say(f"{method}, seed {seed}: training and testing")
            try:
                outcome = final(config)
            except RunFailed as error:
                say(f"{method}, seed {seed}: failed: {error}")
                failures[method].append(str(error))
                continue
        outcomes[method, seed] = outcome
    metric = next(iter(tasks.get(plan.config.task).metrics), None)
    rows = [
        row(
            tuned[method],
            [outcomes[method, seed] for seed in plan.seeds if (method, seed) in outcomes],
            failures[method],
            metric,
            plan.objective.name,
        )
        for method in plan.methods
    ]
    return Comparison(plan, rows, outcomes)


def _check_folder(plan: Plan) -> None:
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: got {folder}, which is a file, expected a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / "search").is_dir():
        raise UserError(
            f"output: got {folder}, which holds other files than a comparison's, expected a new "
            "folder"
        )


def _tuned(
    plan: Plan, method: str, space: Space, train: Train, say: Callable[[str], None]
) -> Tuned:
    config = plan.search_config(method)
    say(f"{method}: choosing {', '.join(space)} on held-out rows")
    try:
        found = search(
            SearchPlan(
                config,
                space,
                plan.objective,
                plan.trials,
                _seconds_left(plan, config, space),
                None,
                "none",
                plan.sampler_seed,
                start=False,
            ),
            train,
            lambda line: say(f"  {line}"),
        )
    except UserError as error:
        return Tuned(method, None, reason=str(error), available=False)
    except (
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
    ) as error:  # PEFT and models fail so where they do not fit
        return Tuned(
            method, None, reason=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
    if found.interrupted:
        raise KeyboardInterrupt
    return _chosen(method, found)


def _chosen(method: str, found: Search) -> Tuned:
    settled = [trial for trial in found.trials if trial.settled]
    spent = sum(trial.seconds for trial in found.trials)
    if found.best is None:
        reason = next(
            (trial.reason for trial in settled if trial.reason),
            "no trial finished within the budget",
        )
        return Tuned(method, None, trials=len(settled), seconds=spent, reason=reason)
    return Tuned(method, found.best_config, found.best.settings, len(settled), spent)


def _seconds_left(plan: Plan, config: RunConfig, space: Space) -> float | None:
    """The budget less what an earlier, interrupted comparison has spent."""
    if plan.seconds is None or not (plan.folder / "search" / config.method).exists():
        return plan.seconds
    study = open_study(config, space, plan.objective, None, "none", start=False)
    return plan.seconds - sum(trial.seconds for trial in trials(study, space))
