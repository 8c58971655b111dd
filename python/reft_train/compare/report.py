"""What a comparison shows: a table, a figure, a page, and the numbers as JSON and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from html import escape
from pathlib import Path

from reft_train.compare.collect import Row, Spread
from reft_train.compare.running import Comparison
from reft_train.files import write_bytes, write_text
from reft_train.methods import TITLES
from reft_train.reporting import html, plots
from reft_train.reporting.strict_json import dumps
from reft_train.reporting.text import aligned
from reft_train.reporting.versions import versions
from reft_train.search.study import shown

_CSV = (
    "method",
    "status",
    "trials",
    "search_seconds",
    "seeds",
    "trainable",
    "head",
    "step_seconds",
    "tokens_per_second",
    "peak_mib",
)


def header(found: Comparison) -> tuple[str, ...]:
    """The table's columns."""
    held_out = f"held-out {found.plan.objective.name}"
    return (
        "method",
        "test",
        held_out,
        "seeds",
        "trained",
        "step",
        "tokens/s",
        "peak memory",
        "chosen",
        "status",
    )


def _spread(value: Spread | None) -> str:
    if value is None:
        return "-"
    return f"{value.mean:.4f}" + ("" if value.deviation is None else f" ± {value.deviation:.4f}")


def line(row: Row, seeds: int) -> tuple[str, ...]:
    """A method's line."""
    chosen = ", ".join(f"{name} {shown(value)}" for name, value in row.varied.items())
    numbers = ("-",) * 4
    if row.trainable is not None:
        trained = f"{row.trainable:,}" + (f" + {row.head:,}" if row.head else "")
        numbers = (
            trained,
            f"{row.step_seconds * 1e3:.1f} ms",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_mib:,.0f} MiB",
        )
    tried = (_spread(row.test), _spread(row.validation), f"{row.seeds}/{seeds}")
    return (TITLES[row.method], *tried, *numbers, chosen or "-", row.status)


def text(found: Comparison) -> str:
    """The table for a terminal, and below it why a method or a run is missing."""
    table = aligned(
        header(found)[:-1], [line(row, len(found.plan.seeds))[:-1] for row in found.rows]
    )
    return "\n".join(
        [
            table,
            *(f"{TITLES[row.method]}: {row.status}" for row in found.rows if row.status != "ok"),
        ]
    )


def notes(found: Comparison) -> list[str]:
    """What the columns mean."""
    plan = found.plan
    budget = (
        f"{plan.trials} {'trial' if plan.trials == 1 else 'trials'}"
        if plan.seconds is None
        else f"{plan.seconds:g} seconds"
    )
    seeds = ", ".join(map(str, plan.seeds))
    lines = [
        f"Each method had {budget} to choose its settings by held-out {plan.objective.name} with "
        f"seed {plan.config.seed}; "
        f"then the best ones were trained and tested with seeds {seeds}: mean ± sample standard "
        "deviation.",
        "test: the task's first metric, averaged over the test sets where there are several. "
        "trained: numbers in the "
        "method, and in a new head. step and tokens/s: medians over the runs. peak memory: the "
        "highest of the runs, each in "
        "a process of its own. The runs alternate between methods.",
    ]
    lines += sorted(
        {f"peak memory is the {row.memory_method}" for row in found.rows if row.memory_method}
    )
    if plan.config.holds_out and not plan.config.validation:
        lines.append(
            "GLUE's published validation rows are split anew by each seed, as the paper does: "
            "rows that chose the settings "
            "with one seed are among those reported with another."
        )
    return lines


def figure(found: Comparison) -> bytes | None:
    """A PNG: test metric (held-out objective where there is none) against trained numbers; None
    where nothing finished.
    """
    tested = any(row.test is not None for row in found.rows)
    points = [(row, row.test if tested else row.validation) for row in found.rows]
    points = [
        (row, value) for row, value in points if value is not None and row.trainable is not None
    ]
    if not points:
        return None
    drawing = plots.new_figure()
    axes = drawing.subplots()
    for number, (row, value) in enumerate(points):
        count = row.trainable + (row.head or 0)
        axes.errorbar(
            count,
            value.mean,
            yerr=value.deviation or 0.0,
            fmt="o",
            capsize=4,
            color=f"C{number}",
            label=TITLES[row.method],
        )
    if all(row.trainable + (row.head or 0) > 0 for row, _ in points):
        axes.set_xscale("log")
    name = "test metric" if tested else f"held-out {found.plan.objective.name}"
    axes.set(xlabel="trained numbers", ylabel=f"{name}, mean and standard deviation")
    axes.grid(alpha=0.3)
    axes.legend()
    return plots.to_png(drawing)


def _csv(found: Comparison) -> str:
    names = list(dict.fromkeys(name for row in found.rows for name in row.tests))
    measured = ["test", "validation", *(f"test/{name}" for name in names)]
    columns = [f"{name}_{part}" for name in measured for part in ("mean", "deviation")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*_CSV, *columns])
    for row in found.rows:
        spreads = [row.test, row.validation, *(row.tests.get(name) for name in names)]
        cells = [
            cell
            for value in spreads
            for cell in ((None, None) if value is None else (value.mean, value.deviation))
        ]
        writer.writerow([getattr(row, name) for name in _CSV] + cells)
    return buffer.getvalue()


def write(found: Comparison) -> list[Path]:
    """Write ``compare.json``, ``compare.csv``, ``compare.png`` and ``report.html``; their paths."""
    plan, folder = found.plan, found.plan.folder
    numbers = {
        "config": plan.config.to_dict(),
        "seeds": plan.seeds,
        "objective": plan.objective.name,
        "budget": {"trials": plan.trials, "seconds": plan.seconds},
        "methods": [asdict(row) for row in found.rows],
        "runs": [
            {"method": method, "seed": seed, **asdict(outcome)}
            for (method, seed), outcome in found.outcomes.items()
        ],
        "versions": versions(),
    }
    paths = [
        write_text(folder / "compare.json", dumps(numbers)),
        write_text(folder / "compare.csv", _csv(found)),
    ]
    png, picture = figure(found), ""
    if png is not None:
        paths.append(write_bytes(folder / "compare.png", png))
        picture = "<h2>Score by size</h2>" + html.image(
            png, "Metric of each method against its trained numbers"
        )
    sets = list(dict.fromkeys(name for row in found.rows for name in row.tests))
    each = ""
    if len(sets) > 1:
        cells = [
            (TITLES[row.method], *(_spread(row.tests.get(name)) for name in sets))
            for row in found.rows
        ]
        each = "<h2>Test sets</h2>" + html.table(("method", *sets), cells)
    facts = [(name, str(value)) for name, value in {**plan.config.to_dict(), **versions()}.items()]
    body = f"""<h1>Methods on {escape(plan.config.task)}</h1>
{html.table(header(found), [line(row, len(plan.seeds)) for row in found.rows])}{"".join(map(html.note, notes(found)))}
{picture}{each}<h2>Shared settings and versions</h2>{html.table(("name", "value"), facts)}"""
    paths.append(write_text(folder / "report.html", html.page("reft-train compare", body)))
    return paths
