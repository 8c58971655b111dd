"""``search``: optimize rank, layers, positions, learning rate and more on held-out rows."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable

import matplotlib
import optuna

from reft_train import flags, models, reporting, tasks
from reft_train.config import RunConfig
from reft_train.errors import wrong
from reft_train.files import write_bytes
from reft_train.search import space, study
from reft_train.search.study import Search, shown
from reft_train.training import session


def resolve_space(parsed: argparse.Namespace, config: RunConfig) -> space.Space:
    """Return the search space of file and flags.

    The default is the method's space without the settings that flags fix.
    """
    fixed, requested = flags.passed(parsed), {}
    if parsed.space is not None:
        requested |= space.read(parsed.space, config.method)
    if parsed.vary:
        requested |= space.parse_flags(parsed.vary, config.method)
    for name in requested:
        if name in fixed:
            flag = f"--{name.replace('_', '-')}"
            raise wrong(flag, f"{fixed[name]!r}, but the search varies it", "one of the two")
    if parsed.space is not None:
        return requested
    hf_config = models.model_config(config)
    encoder = models.kind_of(config, hf_config, tasks.get(config.task)) == models.CLASSIFICATION
    default = space.space_of(config, hf_config, encoder)
    varied = {name: entry for name, entry in default.items() if name not in fixed} | requested
    if not varied:
        raise wrong("--vary", "nothing to vary", "such as 'lr={low: 1e-4, high: 1e-2, log: true}'")
    return varied


def one_process() -> None:
    """Raise UserError if there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise wrong("WORLD_SIZE", "several processes", "one: trials run one after the other")


def table(result: Search) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and a row for each trial that has run, best trials first."""
    objective, names, rows = result.plan.objective, result.plan.space, []
    sign = 1 if objective.direction == "minimize" else -1
    ran = [trial for trial in result.trials if trial.state not in ("waiting", "running")]
    for trial in sorted(ran, key=lambda t: (t.value is None, sign * (t.value or 0.0), t.number)):
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        settings = (shown(trial.settings.get(name, "-")) for name in names)
        state = f"{trial.state} ({trial.reason})" if trial.reason else trial.state
        rows.append((str(trial.number), value, f"{trial.seconds:.0f}", *settings, state))
    return ("trial", f"held-out {objective.name}", "seconds", *names, "state"), rows


def write_report(result: Search) -> None:
    """Write ``report.html`` with optuna's plots of values and, if meaningful, importances."""
    plan, pngs = result.plan, {}
    values = [trial.value for trial in result.trials if trial.value is not None]
    matplotlib.use("Agg")  # optuna plots with pyplot, which would otherwise need a display
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        draw, axes = optuna.visualization.matplotlib, {}
        if values:
            axes["history.png"] = draw.plot_optimization_history(result.study)
        if len(values) > 3 and len(set(values)) > 1:  # fewer give mostly noise
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            axes["importance.png"] = draw.plot_param_importances(result.study, evaluator=evaluator)
        for name, part in axes.items():
            pngs[name] = reporting.to_png(part.figure)
            write_bytes(plan.folder / name, pngs[name])
    best = "no trial has finished" if result.best is None else f"best: trial {result.best.number}"
    objective = f"held-out {plan.objective.name} ({plan.objective.direction})"
    sections = {
        "Trials": [f"{best}; by {objective}. No test set was read.", table(result)],
        "Figures": list(pngs.values()),
        "Space": [dict(plan.space)],
        "Other settings and versions": [plan.config.to_dict(), reporting.versions()],
    }
    title = f"Search: {plan.config.method} on {plan.config.task}"
    reporting.write_page(plan.folder / "report.html", title, sections)


def run(parsed: argparse.Namespace, train: Callable | None = None) -> int:
    """Run the command. Returns 0, 1 when no trial finished, or 130 after Ctrl-C.

    Args:
        train: replaces :func:`reft_train.training.session.train`.
    """
    one_process()
    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/search"
    config = flags.settings(parsed)
    objective, config = study.resolve(config, parsed.objective)
    budget = (parsed.trials, parsed.timeout, parsed.storage, parsed.pruner, parsed.sampler_seed)
    plan = study.SearchPlan(config, resolve_space(parsed, config), objective, *budget)
    result = study.search(plan, train or session.train)
    write_report(result)
    print(reporting.text_table(*table(result)))
    if result.interrupted:
        print(f"interrupted; the same command resumes the search in {plan.folder}")
        return 130
    if result.best is None:
        print("no trial has finished")
        return 1
    path = plan.folder / study.BEST
    print(f"best: trial {result.best.number}; to train and test it: reft-train run --config {path}")
    return 0
