"""Report of a search: a table of trials, and optuna's plots of values and importances."""

from __future__ import annotations

import warnings

import optuna

from reft_train.files import write_bytes
from reft_train.reporting import page
from reft_train.reporting.versions import versions
from reft_train.search.study import Search, shown

_FEW = 4  # with fewer completed trials importances are mostly noise


def table(result: Search) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and a row for each trial that has run, best trials first."""
    objective, names = result.plan.objective, result.plan.space
    sign = 1 if objective.direction == "minimize" else -1
    header = ("trial", f"held-out {objective.name}", "state", "seconds", *names)
    rows = []
    for trial in sorted(
        result.trials, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number)
    ):
        if trial.state not in ("waiting", "running"):
            value = "-" if trial.value is None else f"{trial.value:.4f}"
            settings = (
                shown(trial.settings[name]) if name in trial.settings else "-" for name in names
            )
            rows.append((str(trial.number), value, trial.state, f"{trial.seconds:.0f}", *settings))
    return header, rows


def plots(result: Search) -> dict[str, bytes]:
    """Plot values by trial and, with enough trials, parameter importances, as PNGs by name."""
    import matplotlib

    values = [trial.value for trial in result.trials if trial.value is not None]
    if not values:
        return {}
    matplotlib.use("Agg")  # optuna plots with pyplot, which would otherwise need a display
    from matplotlib import pyplot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        draw = optuna.visualization.matplotlib
        axes = {"history.png": draw.plot_optimization_history(result.study)}
        if len(values) >= _FEW and len(set(values)) > 1:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            axes["importance.png"] = draw.plot_param_importances(result.study, evaluator=evaluator)
    pngs = {name: page.to_png(part.figure) for name, part in axes.items()}
    pyplot.close("all")
    return pngs


def write(result: Search) -> None:
    """Write ``report.html`` and its figures."""
    plan, folder = result.plan, result.plan.folder
    pngs = plots(result)
    for name, png in pngs.items():
        write_bytes(folder / name, png)
    best = "no trial has finished" if result.best is None else f"best: trial {result.best.number}"
    reasons = [(trial.number, trial.state, trial.reason) for trial in result.trials if trial.reason]
    page.write_page(
        folder / "report.html",
        f"Search: {plan.config.method} on {plan.config.task}",
        page.note(
            f"{best}; by held-out {plan.objective.name} ({plan.objective.direction}). No test set "
            "was read."
        ),
        page.table(*table(result)),
        page.heading("Trials that ended early") + page.table(("trial", "state", "reason"), reasons),
        *(page.image(png, name) for name, png in pngs.items()),
        page.heading("What was varied") + page.facts(dict(plan.space)),
        page.heading("Other settings and versions")
        + page.facts({**plan.config.to_dict(), **versions()}),
    )
