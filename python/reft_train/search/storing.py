"""The study behind a search: opened or begun anew, its interrupted trials queued again, its
trials as plain records.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from reft_train.config import RunConfig
from reft_train.errors import UserError
from reft_train.search.objective import Objective
from reft_train.search.space import Space, plain, stored

DATABASE = "search.db"
_NAME = "reft-train"
# what does not change a trial's value, or is the search's own business
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


@dataclass(frozen=True)
class Trial:
    """A trial as reports show it; ``state`` is complete, pruned, failed, interrupted, running or
    waiting.
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
        """It will not be run again."""
        return self.state in ("complete", "pruned", "failed")


def open_study(
    config: RunConfig,
    space: Space,
    objective: Objective,
    storage: str | None,
    pruner: str,
    *,
    start: bool,
) -> optuna.Study:
    """The study of the settings' output folder, with interrupted trials queued again.

    Args:
        start: a new study's first trial has the settings' own values, where the space holds them.

    Raises:
        UserError: a storage that cannot be used, or that holds a search with other settings.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(config.output)
    url = f"sqlite:///{folder.absolute() / DATABASE}" if storage is None else storage
    name = _NAME if storage is None else str(folder)
    identity = _identity(config, space, objective)
    try:
        backend = optuna.storages.get_storage(url)
        study = _create(backend, name, objective)
        if study.user_attrs.get("identity", identity) != identity or config.overwrite:
            if not config.overwrite and any(trial.settled for trial in trials(study, space)):
                raise UserError(_difference(study.user_attrs["identity"], identity, folder))
            optuna.delete_study(study_name=name, storage=backend)
            study = _create(backend, name, objective)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--storage: got {url}, which cannot be used ({' '.join(str(error).split())[:200]})"
        ) from None
    study.pruner = _pruner(pruner)
    if "identity" not in study.user_attrs:
        study.set_user_attr("identity", identity)
        values = {name: getattr(config, name) for name in space}
        values = {name: stored(value) for name, value in values.items() if space[name].holds(value)}
        if start and values:
            study.enqueue_trial(values)
    _retry(study, space)
    return study


def _create(backend: Any, name: str, objective: Objective) -> optuna.Study:
    return optuna.create_study(
        storage=backend, study_name=name, direction=objective.direction, load_if_exists=True
    )


def _pruner(name: str) -> optuna.pruners.BasePruner:
    kinds = {"median": optuna.pruners.MedianPruner, "hyperband": optuna.pruners.HyperbandPruner}
    return kinds.get(name, optuna.pruners.NopPruner)()


def _identity(config: RunConfig, space: Space, objective: Objective) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _FREE and name not in space
    }
    # through JSON, as the storage gives it back
    return json.loads(json.dumps({"objective": objective.name, "space": plain(space), **settings}))


def _difference(old: dict[str, Any], new: dict[str, Any], folder: Path) -> str:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    shown = "; ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in names[:3])
    return (
        f"output: got {folder}, which holds a search with other settings ({shown}), expected "
        "another folder or --overwrite"
    )


def _retry(study: optuna.Study, space: Space) -> None:
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(
            trial.number, state=TrialState.FAIL
        )  # its process is gone: without a reason it counts as interrupted
    known = trials(study, space)
    again = {trial.retries for trial in known}
    for frozen, trial in zip(study.get_trials(deepcopy=False), known, strict=True):
        if trial.state == "interrupted" and frozen.params and trial.number not in again:
            study.enqueue_trial(frozen.params, user_attrs={"retries": trial.number})


def trials(study: optuna.Study, space: Space) -> list[Trial]:
    """All trials of a study by number."""
    return [_record(frozen, space) for frozen in study.get_trials(deepcopy=False)]


def _record(frozen: FrozenTrial, space: Space) -> Trial:
    reason = frozen.user_attrs.get("reason", "")
    state = frozen.state.name.lower()
    if frozen.state is TrialState.FAIL:
        state = "failed" if reason else "interrupted"
    settings = dict(frozen.params)
    for name, entry in space.items():
        if name in settings:
            settings[name] = next(
                (v for v in getattr(entry, "values", ()) if stored(v) == settings[name]),
                settings[name],
            )
    return Trial(
        number=frozen.number,
        state=state,
        value=frozen.value if frozen.state is TrialState.COMPLETE else None,
        settings=settings,
        seconds=float(frozen.user_attrs.get("seconds", 0.0)),
        reason=reason,
        curve=sorted(frozen.intermediate_values.items()),
        retries=frozen.user_attrs.get("retries"),
    )
