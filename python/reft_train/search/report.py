"""What a search shows: its trials as a table, values by trial, and which settings mattered."""

from __future__ import annotations

import warnings
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from reft_train.files import write_bytes, write_text
from reft_train.reporting import html, plots
from reft_train.reporting.text import aligned
from reft_train.reporting.versions import versions
from reft_train.search.space import plain
from reft_train.search.study import Search, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT, HISTORY, IMPORTANCE = "report.html", "history.png", "importance.png"
_FEW = 4  # completed trials below which importances would be noise


def header(found: Search) -> tuple[str, ...]:
    """The table's columns."""
    return ("trial", f"held-out {found.plan.objective.name}", "state", "seconds", *found.plan.space)


def lines(found: Search) -> list[tuple[str, ...]]:
    """A line for each trial that has run, the best ones first."""
    objective = found.plan.objective
    sign = 1 if objective.direction == "minimize" else -1

    def order(trial) -> tuple:
        return (
            trial.value is None,
            0.0 if trial.value is None else sign * trial.value,
            trial.number,
        )

    rows = []
    for trial in sorted(
        (trial for trial in found.trials if trial.state not in ("waiting", "running")), key=order
    ):
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        settings = (
            shown(trial.settings[name]) if name in trial.settings else "-"
            for name in found.plan.space
        )
        rows.append((str(trial.number), value, trial.state, f"{trial.seconds:.0f}", *settings))
    return rows


def text(found: Search) -> str:
    """The table for a terminal."""
    return aligned(header(found), lines(found))


def importances(found: Search) -> dict[str, float]:
    """Each setting's part in the spread of the values (PED-ANOVA); empty after fewer than four
    completed trials.
    """
    import optuna

    complete = [trial for trial in found.trials if trial.value is not None]
    if len(complete) < _FEW or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(found.study, evaluator=evaluator)


def history_figure(found: Search) -> bytes:
    """A PNG: each completed trial's value by its number, and the best so far."""
    figure = plots.new_figure()
    axes: Axes = figure.subplots()
    complete = [trial for trial in found.trials if trial.value is not None]
    numbers, values = [trial.number for trial in complete], [trial.value for trial in complete]
    pick = min if found.plan.objective.direction == "minimize" else max
    axes.scatter(numbers, values, color="#1f77b4", label="trial")
    axes.step(
        numbers,
        [pick(values[: end + 1]) for end in range(len(values))],
        where="post",
        color="#ff7f0e",
        label="best so far",
    )
    axes.set(xlabel="trial", ylabel=f"held-out {found.plan.objective.name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return plots.to_png(figure)


def importance_figure(parts: dict[str, float]) -> bytes:
    """A PNG: bars of :func:`importances`, the largest on top."""
    figure = plots.new_figure((8, 0.6 + 0.4 * len(parts)))
    axes: Axes = figure.subplots()
    names = sorted(parts, key=parts.__getitem__)
    axes.barh(names, [parts[name] for name in names], color="#1f77b4")
    axes.set(xlabel="part in the spread of the held-out values", xlim=(0, 1))
    return plots.to_png(figure)


def write(found: Search) -> list[Path]:
    """Write ``report.html`` and its figures; their paths."""
    folder, objective = found.plan.folder, found.plan.objective
    paths, pictures = [], ""
    if any(trial.value is not None for trial in found.trials):
        png = history_figure(found)
        paths.append(write_bytes(folder / HISTORY, png))
        pictures += "<h2>Values by trial</h2>" + html.image(
            png, "Held-out value of each trial and the best so far"
        )
    parts = importances(found)
    if parts:
        png = importance_figure(parts)
        paths.append(write_bytes(folder / IMPORTANCE, png))
        pictures += "<h2>Importance of the settings</h2>" + html.image(
            png, "Part of each setting in the spread of values"
        )
        pictures += html.note(
            "PED-ANOVA over the completed trials; with few of them, a hint rather than a "
            "measurement."
        )
    reasons = [
        (str(trial.number), trial.state, trial.reason) for trial in found.trials if trial.reason
    ]
    why = (
        "<h2>Trials that ended early</h2>" + html.table(("trial", "state", "reason"), reasons)
        if reasons
        else ""
    )
    best = (
        "no trial has finished"
        if found.best is None
        else f"best: trial {found.best.number}; its settings are in best.yaml"
    )
    facts = [(name, str(entry)) for name, entry in plain(found.plan.space).items()]
    base = [
        (name, str(value)) for name, value in {**found.plan.config.to_dict(), **versions()}.items()
    ]
    body = f"""<h1>Search: {escape(found.plan.config.method)} on {escape(found.plan.config.task)}</h1>
<p>{escape(best)}. Chosen by held-out {escape(objective.name)} ({objective.direction}); no test set was read.</p>
{html.table(header(found), lines(found))}{why}{pictures}
<h2>What was varied</h2>{html.table(("setting", "values"), facts)}
<h2>Other settings and versions</h2>{html.table(("name", "value"), base)}"""
    paths.append(write_text(folder / REPORT, html.page("reft-train search", body)))
    return paths
