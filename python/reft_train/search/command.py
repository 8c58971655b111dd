"""``search``: optimize rank, layers, positions, learning rate and more on held-out rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from reft_train import flags, models, tasks
from reft_train.commands import SearchOptions
from reft_train.config import RunConfig
from reft_train.errors import wrong
from reft_train.search import space, study
from reft_train.training import session


def resolve_space(
    options: SearchOptions, fixed: Mapping[str, Any], config: RunConfig
) -> space.Space:
    """Return what ``--vary`` says, or the method's space without the settings that flags fix."""
    if options.vary:
        varied = space.parse(options.vary, config.method)
        for name in {*varied} & {*fixed}:
            flag = f"--{name.replace('_', '-')}"
            raise wrong(flag, f"{fixed[name]!r}, but the search varies it", "one of the two")
        return varied
    hf_config = models.model_config(config)
    encoder = models.kind_of(config, hf_config, tasks.get(config.task)) == models.CLASSIFICATION
    default = space.space_of(config, hf_config, encoder)
    varied = {name: entry for name, entry in default.items() if name not in fixed}
    if not varied:
        raise wrong("--vary", "nothing to vary", "such as 'lr={low: 1e-4, high: 1e-2, log: true}'")
    return varied


def one_process() -> None:
    """Raise UserError if there are several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise wrong("WORLD_SIZE", "several processes", "one: trials run one after the other")


def run(parsed: argparse.Namespace, train: study.Train = session.train) -> int:
    """Run the command. Returns 0, 1 when no trial finished, or 130 after Ctrl-C.

    Args:
        train: see :func:`reft_train.search.study.search`.
    """
    one_process()
    if parsed.config is None and "output" not in parsed:
        parsed.output = "runs/search"
    options = flags.options(parsed, SearchOptions)
    objective, config = study.resolve(flags.settings(parsed), options.objective)
    varied = resolve_space(options, flags.passed(parsed), config)
    plan = study.SearchPlan(config, varied, objective, options.trials, options.sampler_seed)
    result = study.search(plan, train)
    print(study.table(result.study).to_string(index=False))
    if result.interrupted:
        print(f"interrupted; the same command resumes the search in {plan.folder}")
        return 130
    if result.best is None:
        print("no trial has finished")
        return 1
    path = plan.folder / study.BEST
    print(f"best: trial {result.best.number}; to train and test it: reft-train run --config {path}")
    return 0
