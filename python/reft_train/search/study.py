"""Resumable hyperparameter search with optuna.

Each trial is a training whose held-out value is reported to the study.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas
from accelerate.utils.memory import clear_device_cache
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from transformers import TrainerCallback

from reft_train import tasks
from reft_train.config import Bookkeeping, RunConfig, dump_yaml
from reft_train.errors import UserError, one_line, wrong
from reft_train.files import check_own_folder, write_text
from reft_train.search.space import Space, restored, stored
from reft_train.training.outcome import Outcome

BEST, TRIALS, DATABASE = "best.yaml", "trials.csv", "search.db"
# settings that do not change a trial's value, or that the search sets itself
_FREE = {*Bookkeeping.model_fields, "skip_test", "test", "test_rows", "eval_batch_size"}
_FREE |= {"save_every"}
Train = Callable[..., Outcome]


@dataclass(frozen=True)
class Objective:
    """The held-out metric ``name``, never a metric of a test set."""

    name: str

    @property
    def direction(self) -> str:
        """``minimize`` for a loss, ``maximize`` for every other metric."""
        return "minimize" if self.name in ("loss", "perplexity") else "maximize"

    def of(self, metrics: Mapping[str, float]) -> float:
        """Look up the objective in a run's held-out metrics, with or without Trainer's ``eval_``.

        Raises:
            UserError: the metric is missing.
            FloatingPointError: the metric is not finite.
        """
        plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        if self.name not in plain:
            names = ", ".join(plain) or "none"
            raise wrong("objective", repr(self.name), f"one of the held-out metrics: {names}")
        if not math.isfinite(plain[self.name]):
            raise FloatingPointError(f"held-out {self.name} is {plain[self.name]}")
        return float(plain[self.name])


def resolve(config: RunConfig, requested: str = "auto") -> tuple[Objective, RunConfig]:
    """Return the objective, and the settings with which a run computes it.

    Args:
        requested: a metric of the task, ``loss``, ``metric`` (the task's first), or ``auto``.
            ``auto`` is the metric if the task has classes or ``select`` requests it, else the loss.
    """
    if not config.holds_out:
        raise wrong("validation", "0", "held-out training rows, such as --validation 0.1")
    task = tasks.get(config.task)
    if requested == "auto":
        metric = task.metrics and (task.decoding is None or config.select == "metric")
        requested = "metric" if metric else "loss"
    if requested == "loss":
        # GLUE's held-out rows are only read if the run selects by them
        unseen = config.select == "none" and not config.validation
        return Objective("loss"), config.replace(select="loss") if unseen else config
    if not task.metrics or requested not in ("metric", *task.metrics):
        expected = ", ".join(("loss", *task.metrics))
        raise wrong("objective", repr(requested), f"auto or one of {expected}")
    name = task.metrics[0] if requested == "metric" else requested
    # a run computes its task's held-out metrics only if it selects by them
    return Objective(name), config.replace(select="metric") if config.select == "none" else config


@dataclass(frozen=True)
class SearchPlan:
    """Configuration of a search.

    Attributes:
        config: settings of every trial except the varied ones; ``output`` is the search's folder.
        trials: total number, including earlier sessions.
        prune: whether to stop trials whose held-out value is below the median of the others.
        start: whether to try the configured values first.
    """

    config: RunConfig
    space: Space
    objective: Objective
    trials: int = 20
    sampler_seed: int = 0
    prune: bool = True
    start: bool = True

    @property
    def folder(self) -> Path:
        return Path(self.config.output)


def state_of(trial: FrozenTrial) -> str:
    """Return complete, pruned, failed, interrupted (it will be run again), running or waiting."""
    if trial.state == TrialState.FAIL:
        return "failed" if "reason" in trial.user_attrs else "interrupted"
    return trial.state.name.lower()


def settings_of(trial: FrozenTrial) -> dict[str, Any]:
    return {name: restored(name, value) for name, value in trial.params.items()}


@dataclass
class Search:
    """State of a search."""

    plan: SearchPlan
    study: optuna.Study
    interrupted: bool = False

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def settled(self) -> list[FrozenTrial]:
        """The trials that will not be run again."""
        states = ("complete", "pruned", "failed")
        return [trial for trial in self.trials if state_of(trial) in states]

    @property
    def best(self) -> FrozenTrial | None:
        """The best trial; None if no trial has finished."""
        done = any(trial.state == TrialState.COMPLETE for trial in self.trials)
        return self.study.best_trial if done else None

    @property
    def best_config(self) -> RunConfig:
        """Return the best trial's settings, with the search's subfolder ``best`` as output."""
        output = {"output": str(self.plan.folder / "best"), "resume": False, "overwrite": False}
        return self.plan.config.replace(**settings_of(self.best), **output)


class Watch(TrainerCallback):
    """Report held-out values to optuna, numbered from 1.

    Steps are not used as numbers, since they depend on the batch size, which can vary.
    """

    def __init__(self, trial: optuna.Trial, objective: Objective) -> None:
        self.trial, self.objective, self.evaluations = trial, objective, 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Report the value; raise TrialPruned if pruned before the last step."""
        value = self.objective.of(metrics or {})
        self.evaluations += 1
        self.trial.report(value, self.evaluations)
        if state.global_step < state.max_steps and self.trial.should_prune():
            text = f"held-out {self.objective.name} {value:.4g} at evaluation {self.evaluations}"
            raise optuna.TrialPruned(text)


def search(plan: SearchPlan, train: Train, log: Callable[[str], None] = print) -> Search:
    """Run the missing trials, and write ``best.yaml`` and ``trials.csv``.

    A trial that fails is recorded with its reason. Failures are RuntimeError (including out of
    memory), MemoryError, ArithmeticError, and UserError after another trial has succeeded.

    Args:
        train: called as :func:`reft_train.training.session.train`.
    """
    result = Search(plan, open_study(plan))
    while (settled := len(result.settled)) < plan.trials and not result.interrupted:
        # seeded per trial, so that a resumed search samples the same trials as an uninterrupted one
        seed = random.Random(f"{plan.sampler_seed} {settled}").randrange(2**31)
        result.study.sampler = optuna.samplers.TPESampler(seed=seed)
        trial = result.study.ask(dict(plan.space))
        try:
            _run(result, trial, Watch(trial, plan.objective), train)
        except KeyboardInterrupt:
            # a trial without a recorded reason is resumed later
            result.study.tell(trial, state=TrialState.FAIL)
            result.interrupted = True
        clear_device_cache(garbage_collection=True)
        done = result.trials[trial.number]
        why = done.user_attrs.get("reason", "")
        log(f"trial {done.number}: {state_of(done)} {done.value or why} with {done.params}")
        _save(result)
    return result


def _run(result: Search, trial: optuna.Trial, watch: Watch, train: Train) -> None:
    """Run one trial and report it to the study, except for an interruption, which is raised."""
    plan, study = result.plan, result.study
    output = str(plan.folder / "trials" / str(trial.number))
    fixed = {"output": output, "skip_test": True, "resume": False, "overwrite": True}
    try:
        config = plan.config.replace(**settings_of(result.trials[trial.number]), **fixed)
        outcome = train(config, callbacks=[watch])
        if outcome.interrupted:
            raise KeyboardInterrupt
        study.tell(trial, plan.objective.of(outcome.validation))
    except optuna.TrialPruned as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.PRUNED)
    except (UserError, RuntimeError, MemoryError, ArithmeticError) as error:
        bad_input = isinstance(error, UserError)
        succeeded = any(state_of(known) in ("complete", "pruned") for known in result.trials)
        if bad_input and not succeeded:
            (plan.folder / DATABASE).unlink()
            raise
        kind = "" if bad_input else f"{type(error).__name__}: "
        trial.set_user_attr("reason", f"{kind}{one_line(error)}")
        study.tell(trial, state=TrialState.FAIL)


def open_study(plan: SearchPlan) -> optuna.Study:
    """Open the plan's study in its folder and requeue interrupted trials.

    A study records everything that its values depend on.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, folder, space = plan.config, plan.folder, plan.space
    check_own_folder(folder, [DATABASE, TRIALS, "trials"])
    if config.overwrite:
        shutil.rmtree(folder / "trials", ignore_errors=True)
        (folder / DATABASE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    identity = config.model_dump(mode="json", exclude={*_FREE, *space})
    identity["space"] = {name: distribution_to_json(entry) for name, entry in space.items()}
    identity["objective"] = plan.objective.name
    pruner = optuna.pruners.MedianPruner() if plan.prune else optuna.pruners.NopPruner()
    study = optuna.create_study(
        storage=f"sqlite:///{folder.absolute() / DATABASE}",
        pruner=pruner,
        study_name="search",
        direction=plan.objective.direction,
        load_if_exists=True,
    )
    if study.user_attrs.get("settings", identity) != identity:
        what = f"{folder}, which contains a search with other settings, model or data"
        raise wrong("output", what, "another folder or --overwrite")
    study.set_user_attr("settings", identity)
    trials = study.get_trials(deepcopy=False)
    if not trials and plan.start:
        values = {name: stored(getattr(config, name)) for name in space}
        study.enqueue_trial({n: value for n, value in values.items() if _contains(space[n], value)})
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        if trial.state == TrialState.RUNNING:  # its process has ended
            study.tell(trial.number, state=TrialState.FAIL)
        stopped = state_of(trial) in ("running", "interrupted") and trial.number not in retried
        if stopped and trial.params:
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
    return study


def _contains(entry: optuna.distributions.BaseDistribution, value: Any) -> bool:
    try:
        return entry._contains(entry.to_internal_repr(value))
    except ValueError:
        return False


def table(study: optuna.Study) -> pandas.DataFrame:
    """Return the trials, best first."""
    attributes = ("number", "state", "value", "duration", "params", "user_attrs")
    best_low = study.direction == optuna.study.StudyDirection.MINIMIZE
    return study.trials_dataframe(attributes).sort_values("value", ascending=best_low)


def _save(result: Search) -> None:
    """Write the results, and remove weights and checkpoints of all trials except the best."""
    plan, best = result.plan, result.best
    write_text(plan.folder / TRIALS, table(result.study).to_csv(index=False))
    if best is not None:
        write_text(plan.folder / BEST, dump_yaml(result.best_config))
    for trial in result.trials:
        if best is None or trial.number != best.number:
            folder = plan.folder / "trials" / str(trial.number)
            for path in (folder / "adapter", *folder.glob("checkpoint-*"), folder / ".saving"):
                shutil.rmtree(path, ignore_errors=True)
