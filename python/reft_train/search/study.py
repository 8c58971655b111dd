"""The search itself: ask for a trial, train it, tell its held-out value; failures are recorded,
interruptions mended.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from reft_train.config import RunConfig, dump_yaml
from reft_train.errors import UserError
from reft_train.files import write_text
from reft_train.reporting.strict_json import dumps
from reft_train.search.objective import Objective
from reft_train.search.space import Space, plain, stored, suggest
from reft_train.search.storing import DATABASE, Trial, open_study, trials
from reft_train.search.watching import TimeUp, Watch
from reft_train.training.outcome import Outcome

BEST, TRIALS, MARKER = "best.yaml", "trials.json", "search.json"
Train = Callable[..., Outcome]


@dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
        config: settings of every trial, apart from what varies; ``output`` is the search's folder.
        trials: how many in all, over all continuations; None: as many as the time allows. timeout:
        seconds from now; a trial under way is then stopped, and taken up again when the search goes
        on.
        storage: URL for optuna; None: a file in the output folder. start: try the settings' own
            values first.
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
        """Where the search leaves its files."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Search:
    """A search as it stands: its trials, the best one (None: none finished), and whether Ctrl-C
    ended it.
    """

    plan: Plan
    trials: list[Trial]
    best: Trial | None
    interrupted: bool
    study: optuna.Study

    @property
    def best_config(self) -> RunConfig:
        """The best trial's settings, for a run in a folder ``best`` under the search's."""
        assert self.best is not None
        return self.plan.config.replace(
            **self.best.settings,
            output=str(self.plan.folder / "best"),
            resume=False,
            overwrite=False,
        )


Clock = Callable[[], float]


def search(
    plan: Plan, train: Train, say: Callable[[str], None] = print, clock: Clock = time.monotonic
) -> Search:
    """Run the trials that are missing, and write ``best.yaml`` and ``trials.json``.

    A trial that fails (RuntimeError, which out-of-memory errors are, MemoryError, ArithmeticError,
    or a UserError once another trial has worked) is recorded with its reason. The test sets are not
    read.

    Args:
        train: ``train(config, callbacks=..., report=False)``, as
            :func:`reft_train.training.session.train`.

    Raises:
        UserError: a folder or a storage that cannot be used, or what a trial refuses before any has
            worked.
    """
    _prepare(plan)
    study = open_study(
        plan.config, plan.space, plan.objective, plan.storage, plan.pruner, start=plan.start
    )
    write_text(
        plan.folder / MARKER,
        json.dumps({"objective": plan.objective.name, "space": plain(plan.space)}, indent=1),
    )
    deadline = None if plan.timeout is None else clock() + plan.timeout
    interrupted = False
    while not interrupted and not _over(plan, study, deadline, clock):
        interrupted = _trial(plan, study, train, deadline, say, clock)
        _save(plan, study)
    return _result(plan, study, interrupted)


def _over(plan: Plan, study: optuna.Study, deadline: float | None, clock: Clock) -> bool:
    enough = plan.trials is not None and _settled(plan, study) >= plan.trials
    return enough or (deadline is not None and clock() >= deadline)


def _settled(plan: Plan, study: optuna.Study) -> int:
    return sum(trial.settled for trial in trials(study, plan.space))


def _prepare(plan: Plan) -> None:
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: got {folder}, which is a file, expected a folder")
    own = any((folder / name).is_file() for name in (MARKER, DATABASE))
    if folder.exists() and any(folder.iterdir()) and not own:
        raise UserError(
            f"output: got {folder}, which holds other files than a search's, expected a new folder"
        )
    if plan.config.overwrite:
        shutil.rmtree(folder / "trials", ignore_errors=True)
        for name in (BEST, TRIALS):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def _sampler(plan: Plan, study: optuna.Study) -> optuna.samplers.BaseSampler:
    # seeded anew for each trial, so that a search that was interrupted tries what an uninterrupted
    # one would have
    seed = np.random.SeedSequence([plan.sampler_seed, _settled(plan, study)]).generate_state(1)[0]
    return optuna.samplers.TPESampler(seed=int(seed))


def trial_folder(plan: Plan, number: int) -> Path:
    """Where a trial leaves its files."""
    return plan.folder / "trials" / str(number)


def _trial(
    plan: Plan,
    study: optuna.Study,
    train: Train,
    deadline: float | None,
    say: Callable[[str], None],
    clock: Clock,
) -> bool:
    """One trial, from asking to telling; whether it was interrupted."""
    study.sampler = _sampler(plan, study)
    trial = study.ask()
    settings = suggest(trial, plan.space)
    watch = Watch(trial, plan.objective, deadline, clock)
    started = clock()
    value, reason, state = None, "", TrialState.FAIL
    try:
        config = plan.config.replace(
            **settings,
            output=str(trial_folder(plan, trial.number)),
            skip_test=True,
            resume=False,
            overwrite=True,
        )
        outcome = train(config, callbacks=[watch], report=False)
        if not outcome.interrupted:
            value, state = plan.objective.of(outcome.validation), TrialState.COMPLETE
        interrupted = outcome.interrupted
    except optuna.TrialPruned as error:
        reason, state, interrupted = str(error), TrialState.PRUNED, False
    except TimeUp:
        interrupted = (
            False  # the loop sees the deadline; without a reason the trial is taken up again
        )
    except KeyboardInterrupt:
        interrupted = True
    except UserError as error:
        if not any(known.state in ("complete", "pruned") for known in trials(study, plan.space)):
            study.tell(trial, state=TrialState.FAIL)
            raise
        reason, interrupted = str(error), False
    except (RuntimeError, MemoryError, ArithmeticError) as error:
        reason, interrupted = _first_line(error), False
    _free_memory()
    trial.set_user_attr("seconds", clock() - started)
    if reason:
        trial.set_user_attr("reason", reason)
    study.tell(trial, value, state=state)
    record = trials(study, plan.space)[trial.number]
    say(describe(record, plan.objective))
    return interrupted


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:300]


def _free_memory() -> None:
    gc.collect()
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def shown(value: Any) -> str:
    """A setting's value as a table shows it."""
    return f"{value:.3g}" if isinstance(value, float) else str(stored(value))


def describe(trial: Trial, objective: Objective) -> str:
    """A finished trial in a line."""
    result = f"{objective.name} {trial.value:.4f}" if trial.value is not None else trial.state
    why = f" ({trial.reason})" if trial.reason else ""
    settings = ", ".join(f"{name} {shown(value)}" for name, value in trial.settings.items())
    return f"trial {trial.number}: {result}{why} in {trial.seconds:.0f} s with {settings}"


def _result(plan: Plan, study: optuna.Study, interrupted: bool) -> Search:
    known = trials(study, plan.space)
    number = plan.objective.best(
        {trial.number: trial.value for trial in known if trial.value is not None}
    )
    return Search(plan, known, None if number is None else known[number], interrupted, study)


def _save(plan: Plan, study: optuna.Study) -> None:
    """Write what is known, and remove weights and checkpoints of all trials but the best."""
    found = _result(plan, study, False)
    numbers = {
        "objective": plan.objective.name,
        "direction": plan.objective.direction,
        "best": None if found.best is None else found.best.number,
        "trials": [asdict(trial) for trial in found.trials],
    }
    write_text(plan.folder / TRIALS, dumps(numbers))
    if found.best is not None:
        write_text(plan.folder / BEST, dump_yaml(found.best_config))
    for trial in found.trials:
        if found.best is None or trial.number != found.best.number:
            folder = trial_folder(plan, trial.number)
            for path in [folder / "adapter", *folder.glob("checkpoint-*"), *folder.glob(".saving")]:
                shutil.rmtree(path, ignore_errors=True)
