"""Report of a comparison: a table, a figure, a page, and the results as JSON and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

from reft_train.compare.running import Comparison, MethodResult
from reft_train.files import dumps, write_bytes, write_text
from reft_train.methods import TITLES
from reft_train.reporting import page
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


def header(comparison: Comparison) -> tuple[str, ...]:
    """Return the table's column names."""
    held_out = f"held-out {comparison.plan.objective.name}"
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


def line(row: MethodResult, seeds: int) -> tuple[str, ...]:
    """Return a method's table row."""
    numbers = ("-",) * 4
    if row.trainable is not None:
        trained = f"{row.trainable:,}" + (f" + {row.head:,}" if row.head else "")
        numbers = (
            trained,
            f"{row.step_seconds * 1e3:.1f} ms",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_mib:,.0f} MiB",
        )
    chosen = ", ".join(f"{name} {shown(value)}" for name, value in row.varied.items())
    tried = (str(row.test or "-"), str(row.validation or "-"), f"{row.seeds}/{seeds}")
    return (TITLES[row.method], *tried, *numbers, chosen or "-", row.status)


def text(comparison: Comparison) -> str:
    """Format the table for a terminal, followed by the reasons for missing methods or runs."""
    rows = [line(row, len(comparison.plan.seeds))[:-1] for row in comparison.rows]
    reasons = (
        f"{TITLES[row.method]}: {row.status}" for row in comparison.rows if row.status != "ok"
    )
    return "\n".join([page.text_table(header(comparison)[:-1], rows), *reasons])


def notes(comparison: Comparison) -> list[str]:
    """Describe the columns."""
    plan = comparison.plan
    budget = f"{plan.trials} trial(s)" if plan.seconds is None else f"{plan.seconds:g} seconds"
    lines = [
        f"Each method had {budget} to choose its settings by held-out {plan.objective.name} with "
        "seed "
        f"{plan.config.seed}; then the best ones were trained and tested with seeds "
        f"{', '.join(map(str, plan.seeds))}: mean ± sample standard deviation.",
        "test: the task's first metric, averaged over the test sets. trained: numbers in the "
        "method, and in a new "
        "head. step and tokens/s: medians over the runs. peak memory: the highest of the runs, "
        "each in a process "
        "of its own. The runs alternate between methods.",
    ]
    lines += sorted(
        {f"peak memory is the {row.memory_method}" for row in comparison.rows if row.memory_method}
    )
    if plan.config.holds_out and not plan.config.validation:
        lines.append(
            "GLUE's published validation rows are split anew by each seed, as the paper does: "
            "rows that chose the "
            "settings with one seed are among those reported with another."
        )
    return lines


def figure(comparison: Comparison) -> bytes | None:
    """Plot test metric (or held-out objective) by trainable parameters as a PNG.

    Returns None if nothing finished.
    """
    tested = any(row.test is not None for row in comparison.rows)
    points = [(row, row.test if tested else row.validation) for row in comparison.rows]
    points = [
        (row, value) for row, value in points if value is not None and row.trainable is not None
    ]
    if not points:
        return None
    drawing = page.new_figure()
    axes = drawing.subplots()
    counts = [row.trainable + (row.head or 0) for row, _ in points]
    for count, (row, value) in zip(counts, points, strict=True):
        axes.errorbar(
            count,
            value.mean,
            yerr=value.deviation or 0.0,
            fmt="o",
            capsize=4,
            label=TITLES[row.method],
        )
    axes.set_xscale("log" if all(counts) else "linear")
    axes.set(
        xlabel="trained numbers",
        ylabel="test metric" if tested else f"held-out {comparison.plan.objective.name}",
    )
    axes.legend()
    return page.to_png(drawing)


def _csv(comparison: Comparison) -> str:
    sets = list(dict.fromkeys(name for row in comparison.rows for name in row.tests))
    columns = ["test", "validation", *(f"test/{name}" for name in sets)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [*_CSV, *(f"{name}_{part}" for name in columns for part in ("mean", "deviation"))]
    )
    for row in comparison.rows:
        spreads = [row.test, row.validation, *(row.tests.get(name) for name in sets)]
        cells = [
            cell
            for value in spreads
            for cell in ((value.mean, value.deviation) if value else (None, None))
        ]
        writer.writerow([getattr(row, name) for name in _CSV] + cells)
    return buffer.getvalue()


def write(comparison: Comparison) -> None:
    """Write ``compare.json``, ``compare.csv``, ``compare.png`` and ``report.html``."""
    plan, folder = comparison.plan, comparison.plan.folder
    runs = [
        {"method": method, "seed": seed, **asdict(outcome)}
        for (method, seed), outcome in comparison.outcomes.items()
    ]
    numbers = {
        "config": plan.config.to_dict(),
        "seeds": plan.seeds,
        "objective": plan.objective.name,
        "budget": {"trials": plan.trials, "seconds": plan.seconds},
        "methods": [asdict(row) for row in comparison.rows],
        "runs": runs,
        "versions": versions(),
    }
    write_text(folder / "compare.json", dumps(numbers))
    write_text(folder / "compare.csv", _csv(comparison))
    png = figure(comparison)
    if png is not None:
        write_bytes(folder / "compare.png", png)
    sets = list(dict.fromkeys(name for row in comparison.rows for name in row.tests))
    each = [
        (TITLES[row.method], *(row.tests.get(name, "-") for name in sets))
        for row in comparison.rows
    ]
    page.write_page(
        folder / "report.html",
        f"Methods on {plan.config.task}",
        page.table(header(comparison), [line(row, len(plan.seeds)) for row in comparison.rows]),
        *map(page.note, notes(comparison)),
        "" if png is None else page.image(png, "Metric of each method by its trained numbers"),
        page.table(("method", *sets), each) if len(sets) > 1 else "",
        page.heading("Shared settings and versions"),
        page.facts({**plan.config.to_dict(), **versions()}),
    )
