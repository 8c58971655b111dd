"""Resumable hyperparameter search with optuna.

Each trial is a training whose held-out value is reported to the study.
"""

from __future__ import annotations

import gc
import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback

from reft_train.config import RunConfig, dump_yaml
from reft_train.errors import UserError
from reft_train.files import dumps, write_text
from reft_train.search.objective import Objective
from reft_train.search.space import Space, holds, restored, stored
from reft_train.training.outcome import Outcome

BEST, TRIALS, DATABASE = "best.yaml", "trials.json", "search.db"
# settings that do not change a trial's value, or that the search sets itself
_FREE = (
    "output",
    "resume",
    "overwrite",
    "skip_test",
    "test",
    "test_rows",
    "workers",
    "threads",
    "cache",
    "keep",
    "log_every",
    "save_every",
    "eval_batch_size",
)
Train = Callable[..., Outcome]
Clock = Callable[[], float]


@dataclass(frozen=True)
class SearchPlan:
    """Configuration of a search.

    Attributes:
        config: settings of every trial except the varied ones; ``output`` is the search's folder.
        trials: total number, including earlier sessions. None: as many as the time allows.
        timeout: seconds from now; a running trial is then stopped, and resumed in a later session.
        storage: URL for optuna. None: a file in the output folder.
        start: whether to try the configured values first.
    """

    config: RunConfig
    space: Space
    objective: Objective
    trials: int | None = 20
    timeout: float | None = None
    storage: str | None = None
    pruner: str = "median"
    sampler_seed: int = 0
    start: bool = True

    @property
    def folder(self) -> Path:
        """Output folder of the search."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Trial:
    """A trial for reports.

    ``state`` is complete, pruned, failed, interrupted, running or waiting.
    """

    number: int
    state: str
    value: float | None
    settings: dict[str, Any]
    seconds: float
    reason: str
    curve: list[tuple[int, float]]
    retries: int | None

    @property
    def settled(self) -> bool:
        """Whether the trial will not be run again."""
        return self.state in ("complete", "pruned", "failed")


@dataclass(frozen=True)
class Search:
    """State of a search; ``best`` is None if no trial has finished."""

    plan: SearchPlan
    trials: list[Trial]
    best: Trial | None
    interrupted: bool
    study: optuna.Study

    @property
    def best_config(self) -> RunConfig:
        """Return the best trial's settings, with the search's subfolder ``best`` as output."""
        output = str(self.plan.folder / "best")
        return self.plan.config.replace(
            **self.best.settings, output=output, resume=False, overwrite=False
        )


class TimeUp(Exception):
    """Raised when the search's time is over."""


class Watch(TrainerCallback):
    """Report held-out values to optuna, numbered from 1.

    Steps are not used as numbers, since they depend on the batch size, which can vary.
    """

    def __init__(
        self, trial: optuna.Trial, objective: Objective, deadline: float | None, clock: Clock
    ) -> None:
        self.trial, self.objective, self.deadline, self.clock = trial, objective, deadline, clock
        self.evaluations = 0

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Report the value; raise TrialPruned if pruned before the last step."""
        value = self.objective.of(metrics or {})
        self.evaluations += 1
        self.trial.report(value, self.evaluations)
        if state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned(
                f"held-out {self.objective.name} {value:.4g} at evaluation {self.evaluations}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise TimeUp after the deadline."""
        if self.deadline is not None and self.clock() >= self.deadline:
            raise TimeUp


def search(
    plan: SearchPlan,
    train: Train,
    log: Callable[[str], None] = print,
    clock: Clock = time.monotonic,
) -> Search:
    """Run the missing trials, and write ``best.yaml`` and ``trials.json``.

    A trial that fails is recorded with its reason. Failures are RuntimeError (including out of
    memory), MemoryError, ArithmeticError, and UserError after another trial has succeeded.

    Args:
        train: called as :func:`reft_train.training.session.train`.
    """
    _prepare(plan)
    study = open_study(plan)
    deadline = None if plan.timeout is None else clock() + plan.timeout
    interrupted = False
    while not interrupted and (deadline is None or clock() < deadline):
        settled = sum(trial.settled for trial in trials(study))
        if plan.trials is not None and settled >= plan.trials:
            break
        # seeded per trial, so that a resumed search samples the same trials as an uninterrupted one
        seed = random.Random(f"{plan.sampler_seed} {settled}").randrange(2**31)
        study.sampler = optuna.samplers.TPESampler(seed=seed)
        interrupted = _trial(plan, study, train, deadline, log, clock)
        _save(plan, study)
    return _result(plan, study, interrupted)


def _prepare(plan: SearchPlan) -> None:
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: got {folder}, which is a file, expected a folder")
    is_search = any((folder / name).exists() for name in (DATABASE, TRIALS, "trials"))
    if folder.exists() and any(folder.iterdir()) and not is_search:
        raise UserError(
            f"output: got {folder}, which holds other files than a search's, expected a new folder"
        )
    if plan.config.overwrite:
        shutil.rmtree(folder / "trials", ignore_errors=True)
        for name in (BEST, TRIALS):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def open_study(plan: SearchPlan) -> optuna.Study:
    """Open the plan's study and requeue interrupted trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, space = plan.config, plan.space
    url = f"sqlite:///{plan.folder.absolute() / DATABASE}" if plan.storage is None else plan.storage
    name = "reft-train" if plan.storage is None else str(plan.folder)
    settings = {
        key: value for key, value in config.to_dict().items() if key not in (*_FREE, *space)
    }
    entries = {key: json.loads(distribution_to_json(entry)) for key, entry in space.items()}
    # a JSON round trip gives the values as the storage returns them
    identity = json.loads(
        json.dumps({"objective": plan.objective.name, "space": entries, **settings})
    )
    kinds = {"median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner}
    options = {
        "study_name": name,
        "direction": plan.objective.direction,
        "load_if_exists": True,
        "pruner": kinds.get(plan.pruner, optuna.pruners.NopPruner)(),
    }
    try:
        storage = optuna.storages.get_storage(url)
        study = optuna.create_study(storage=storage, **options)
        old = study.user_attrs.get("identity", identity)
        if (
            old != identity
            and not config.overwrite
            and any(trial.settled for trial in trials(study))
        ):
            raise UserError(_difference(old, identity, plan.folder))
        if old != identity or config.overwrite:
            optuna.delete_study(study_name=name, storage=storage)
            study = optuna.create_study(storage=storage, **options)
    except UserError:
        raise
    except (SQLAlchemyError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--storage: got {url}, which cannot be used ({reason})") from None
    if "identity" not in study.user_attrs:
        study.set_user_attr("identity", identity)
        values = {key: getattr(config, key) for key in space}
        values = {key: stored(value) for key, value in values.items() if holds(space[key], value)}
        if plan.start and values:
            study.enqueue_trial(values)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)  # its process has ended
    again = {trial.retries for trial in trials(study)}
    for trial, frozen in zip(trials(study), study.get_trials(deepcopy=False), strict=True):
        if trial.state == "interrupted" and frozen.params and trial.number not in again:
            study.enqueue_trial(frozen.params, user_attrs={"retries": trial.number})
    return study


def _difference(old: dict[str, Any], new: dict[str, Any], folder: Path) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = "; ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names[:3])
    what = f"which holds a search with other settings ({shown})"
    return f"output: got {folder}, {what}, expected another folder or --overwrite"


def trials(study: optuna.Study) -> list[Trial]:
    """Return all trials of a study by number."""
    return [_record(frozen) for frozen in study.get_trials(deepcopy=False)]


def _record(frozen: FrozenTrial) -> Trial:
    reason, state = frozen.user_attrs.get("reason", ""), frozen.state.name.lower()
    return Trial(
        number=frozen.number,
        state=("failed" if reason else "interrupted") if state == "fail" else state,
        value=frozen.value if state == "complete" else None,
        settings={name: restored(name, value) for name, value in frozen.params.items()},
        seconds=float(frozen.user_attrs.get("seconds", 0.0)),
        reason=reason,
        curve=sorted(frozen.intermediate_values.items()),
        retries=frozen.user_attrs.get("retries"),
    )


def _trial(
    plan: SearchPlan,
    study: optuna.Study,
    train: Train,
    deadline: float | None,
    log: Callable,
    clock: Clock,
) -> bool:
    """Run one trial from sampling to reporting; return whether it was interrupted."""
    trial = study.ask(dict(plan.space))
    settings = {name: restored(name, value) for name, value in trial.params.items()}
    started, value, reason, state, interrupted = clock(), None, "", TrialState.FAIL, False
    try:
        output = str(plan.folder / "trials" / str(trial.number))
        config = plan.config.replace(
            **settings, output=output, skip_test=True, resume=False, overwrite=True
        )
        outcome = train(
            config, callbacks=[Watch(trial, plan.objective, deadline, clock)], report=False
        )
        interrupted = outcome.interrupted
        if not interrupted:
            value, state = plan.objective.of(outcome.validation), TrialState.COMPLETE
    except optuna.TrialPruned as error:
        reason, state = str(error), TrialState.PRUNED
    except TimeUp:
        pass  # a trial without a recorded reason is resumed later
    except KeyboardInterrupt:
        interrupted = True
    except UserError as error:
        if not any(known.state in ("complete", "pruned") for known in trials(study)):
            study.tell(trial, state=TrialState.FAIL)
            raise
        reason = str(error)
    except (RuntimeError, MemoryError, ArithmeticError) as error:
        text = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {text}"[:300]
    _free_memory()
    trial.set_user_attr("seconds", clock() - started)
    if reason:
        trial.set_user_attr("reason", reason)
    study.tell(trial, value, state=state)
    log(describe(trials(study)[trial.number], plan.objective))
    return interrupted


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def shown(value: Any) -> str:
    """Format a setting's value for a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(stored(value))


def describe(trial: Trial, objective: Objective) -> str:
    """Describe a finished trial in one line."""
    result = f"{objective.name} {trial.value:.4f}" if trial.value is not None else trial.state
    why = f" ({trial.reason})" if trial.reason else ""
    settings = ", ".join(f"{name} {shown(value)}" for name, value in trial.settings.items())
    return f"trial {trial.number}: {result}{why} in {trial.seconds:.0f} s with {settings}"


def _result(plan: SearchPlan, study: optuna.Study, interrupted: bool = False) -> Search:
    known = trials(study)
    number = plan.objective.best(
        {trial.number: trial.value for trial in known if trial.value is not None}
    )
    return Search(plan, known, None if number is None else known[number], interrupted, study)


def _save(plan: SearchPlan, study: optuna.Study) -> None:
    """Write the results, and remove weights and checkpoints of all trials except the best."""
    result = _result(plan, study)
    numbers = {
        "objective": plan.objective.name,
        "direction": plan.objective.direction,
        "best": None if result.best is None else result.best.number,
        "trials": [asdict(trial) for trial in result.trials],
    }
    write_text(plan.folder / TRIALS, dumps(numbers))
    if result.best is not None:
        write_text(plan.folder / BEST, dump_yaml(result.best_config))
    for trial in result.trials:
        if result.best is None or trial.number != result.best.number:
            folder = plan.folder / "trials" / str(trial.number)
            for path in (folder / "adapter", *folder.glob("checkpoint-*"), folder / ".saving"):
                shutil.rmtree(path, ignore_errors=True)
